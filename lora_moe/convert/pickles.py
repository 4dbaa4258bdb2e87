"""Reads state dicts written by torch.save; the only place in this package that reads pickles.

archive.zip   <name>/data.pkl          the pickle: keys, shapes, and the record of each tensor
              <name>/data/0, 1, ...    records: the values, stored uncompressed

Only such archives are read.  The pickle is first checked without running it: it may only build dicts of
tensors, in a limited number of steps.  torch.load(weights_only=True) then runs it and memory-maps the
records, so tensors are read only when they are used.
"""

from __future__ import annotations

import os
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from reprlib import repr as brief

import torch

from ..opening import open_regular

MAX_FILE = 1 << 36  # bytes
MAX_DIRECTORY = 2 << 20  # bytes of the archive's list of records: about 20,000
MAX_PICKLE = 4 << 20  # bytes
MAX_STEPS = 400_000  # of the pickle: about 12,000 tensors
_STORAGES = ("FloatStorage", "DoubleStorage", "HalfStorage", "BFloat16Storage")
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}" for name in (*_STORAGES, "LongStorage", "IntStorage", "BoolStorage")),
}
_STEPS = {
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "GLOBAL", "REDUCE", "BUILD"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "BINPERSID"),
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("SETITEM", "SETITEMS", "APPEND", "APPENDS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
}  # fmt: skip
# what zipfile raises for damaged archives
_DAMAGE = (
    *(zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError),
    *(struct.error, OverflowError, zlib.error),
)
_NESTS = ("model", "state_dict", "module")  # names under which a checkpoint may hold its state dict


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, on the CPU, mapped from the file.

    Raises:
        ValueError: if it is not a torch.save archive, its pickle does more than build a dict of tensors, a
            tensor is not contiguous, or the tensors are larger than the file.
        OSError: if it cannot be read.
    """
    with open_regular(path, pickles=True) as file:
        size = os.fstat(file.fileno()).st_size
        _expect_archive(path, file, size)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything in torch's reader
        raise ValueError(f"{path}: expected a state dict, got {brief(str(error))}") from None
    return _tensors(path, state, size)


def _tensors(path, state, size):
    nest = [name for name in _NESTS if isinstance(state, dict) and list(state) == [name]]
    state = state[nest[0]] if nest else state
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(state).__name__}")
    claimed = {}
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
            kind = type(tensor).__name__
            raise ValueError(
                f"{path}: {ascii(key)[:200]}: expected a contiguous tensor, got a {kind}"
            )
        claimed[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    if sum(claimed.values()) > size:
        raise ValueError(
            f"{path}: expected tensors of at most the file's {size} bytes, got {sum(claimed.values())}"
        )
    return {key: tensor.detach() for key, tensor in state.items()}


def _expect_archive(path, file, size):
    """Raise ValueError before torch reads the file."""
    if size > MAX_FILE:
        raise ValueError(f"{path}: expected at most {MAX_FILE} bytes, got {size}")
    if file.read(2) != b"PK":
        raise ValueError(
            f"{path}: expected an archive of torch.save (1.6 or later), got another file; save it again"
        )
    _expect_small_directory(path, file, size)
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            found = [r for r in records if r.filename.endswith("/data.pkl")]
            packed = [r for r in records if r.compress_type or r.file_size != r.compress_size]
            if len(found) != 1 or packed or found[0].file_size > MAX_PICKLE:
                raise ValueError(
                    f"{path}: expected one data.pkl of at most {MAX_PICKLE} bytes and no compression, got"
                    f" {len(found)} of {[r.file_size for r in found][:3]} and {len(packed)} compressed"
                )
            pickled = archive.read(found[0])
    except _DAMAGE as error:
        raise ValueError(f"{path}: expected an archive, got {error}") from None
    _expect_tensors_only(path, pickled)


def _expect_small_directory(path, file, size):
    """Check the end record before zipfile parses it, since zipfile trusts it."""
    tail = min(size, 1 << 16)
    file.seek(size - tail)
    end = file.read(tail)
    at = end.rfind(b"PK\5\6")
    directory = struct.unpack_from("<L", end, at + 12)[0] if 0 <= at <= tail - 22 else size
    wide = end.rfind(b"PK\6\6", 0, max(at, 0))
    if 0 <= wide <= tail - 56:
        directory = max(directory % 0xFFFFFFFF, struct.unpack_from("<Q", end, wide + 40)[0])
    if directory > MAX_DIRECTORY:
        raise ValueError(
            f"{path}: expected a list of records of at most {MAX_DIRECTORY} bytes, got {directory}"
        )


def _expect_tensors_only(path, pickled):
    """Check each step of the pickle without running it."""
    tuples, last = set(), ""
    try:
        for count, (step, value, _) in enumerate(pickletools.genops(pickled)):
            name = step.name
            if name not in _STEPS or (name == "GLOBAL" and value not in _GLOBALS):
                what = f"{name} {value!r:.100}" if name == "GLOBAL" else name
                raise ValueError(
                    f"{path}: expected a pickle of tensors, got {what}; it was not loaded"
                )
            if count > MAX_STEPS:
                raise ValueError(
                    f"{path}: expected a pickle of at most {MAX_STEPS} steps, got more"
                )
            if name in ("BINPUT", "LONG_BINPUT") and "TUPLE" in last:
                tuples.add(value)
            elif name in ("BINGET", "LONG_BINGET") and value in tuples:
                # a tuple of tuples of tuples ... takes exponential time to hash
                raise ValueError(f"{path}: expected a pickle of tensors, got a shared tuple")
            last = name
    except (ValueError, IndexError, EOFError, struct.error, UnicodeDecodeError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(
            f"{path}: expected a pickle of tensors, got a damaged one: {error}"
        ) from None
