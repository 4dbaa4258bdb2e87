"""Safetensors files: written atomically, read as untrusted input.

8 bytes  N, little-endian
N bytes  JSON {key: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, ...}
data     the tensors, one after the other

The reader only opens regular files, never through a symbolic link, and checks the header against the
file's size: tensors must cover the data without gaps or overlaps.  Allocations are bounded by the
header's limit and the tensors that the caller requests; pickles are never loaded.  Reading takes the
memory of the tensors in the caller's dtypes plus CHUNK.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from reprlib import repr as brief
from typing import BinaryIO, NamedTuple

import torch

from .opening import open_in, open_regular, path_in  # noqa: F401  readers take them here
from .replace import replacing

MAX_HEADER = 2 << 20  # bytes: about 10,000 tensors
MAX_DIMENSIONS = 8
CHUNK = 1 << 22  # bytes converted at a time
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
# dtypes of buffers, such as BatchNorm's num_batches_tracked; never converted
WHOLE_NUMBERS = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_KNOWN = DTYPES | WHOLE_NUMBERS
_NAMES = {dtype: name for name, dtype in _KNOWN.items()}
_PICKLE_MAGIC = (b"PK", b"\x80")  # torch.save's zip archive, and a bare pickle


class Slice(NamedTuple):
    """A tensor's place in a file."""

    dtype: str  # a key of DTYPES or WHOLE_NUMBERS, or another dtype of the format
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    nbytes: int


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file atomically: after a crash there is the old or the new file.

    Raises:
        ValueError: if the header would be larger than read_header accepts, or a tensor is on meta, has
            a dtype neither in DTYPES nor in WHOLE_NUMBERS, or shares memory with another, which
            loading would not restore.
        OSError: if the file cannot be written; an existing one is unchanged.
    """
    tensors = {key: t.detach() for key, t in tensors.items()}
    _expect_writable(tensors)
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # aligned
    header, end = {"__metadata__": metadata}, 0
    for key in order:
        begin, end = end, end + tensors[key].numel() * tensors[key].element_size()
        shape = list(tensors[key].shape)
        entry = {"dtype": _NAMES[tensors[key].dtype], "shape": shape, "data_offsets": [begin, end]}
        header[key] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(tensors[key].cpu().contiguous().flatten().view(torch.uint8).numpy())
        file.flush()
        with open(file.name, "rb") as written:
            read_header(written)  # never replace a file by one that does not load


def write_described(
    path: Path, tensors: dict[str, torch.Tensor], key: str, description: dict
) -> None:
    """Write a file for read_described; raises as in write."""
    write(path, tensors, {"format": "pt", key: json.dumps(description)})


def _expect_writable(tensors):
    for key, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            kinds = [str(dtype) for dtype in _NAMES]
            got = f"{tensor.dtype}, {tensor.layout}"
            raise ValueError(f"{key}: expected a dense tensor of one of {kinds}, got {got}")
        if tensor.device.type == "meta":
            raise ValueError(f"{key}: expected values to save, got a tensor on the meta device")
    spans = sorted(
        (str(t.device), t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), key)
        for key, t in tensors.items()
        if t.numel() and t.is_contiguous()
    )
    for (device, _, end, key), (other_device, begin, _, other) in pairwise(spans):
        if device == other_device and begin < end:
            raise ValueError(
                f"{key}: expected tensors that share no memory, but it shares memory with {other}, which"
                " loading would not restore; clone one of them with tensor.clone()"
            )


def read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, Slice]]:
    """The metadata and every tensor's place, checked against the size of the file.

    Raises:
        ValueError: if the file is truncated, overlapping, oversized, or not a safetensors file.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        hint = " (this is a pickle)" if prefix.startswith(_PICKLE_MAGIC) else ""
        limit = f"a header of at most {MAX_HEADER} bytes inside a file of {size}"
        raise ValueError(f"{file.name}: expected {limit}, got {length} bytes{hint}")
    text = file.read(length)
    if text.count(b"[") + text.count(b"{") > length // 12 + 8:  # a tensor has three in 50 bytes
        raise ValueError(f"{file.name}: expected a header of tensors, got empty brackets")
    header = parse_json(text, file.name)
    if not isinstance(header, dict):
        raise ValueError(
            f"{file.name}: expected a JSON object as header, got {type(header).__name__}"
        )
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise ValueError(f"{file.name}: expected an object of strings as metadata")
    slices = {key: _slice(file.name, key, entry, 8 + length, size) for key, entry in header.items()}
    ends = sorted((s.begin, s.begin + s.nbytes) for s in slices.values())
    ends = [(0, 8 + length), *ends, (size, size)]
    if any(end != begin for (_, end), (begin, _) in pairwise(ends)):
        raise ValueError(f"{file.name}: expected tensors to fill the file without gaps or overlaps")
    return metadata, slices


def read_described(
    file: BinaryIO, key: str, versions: Collection[int] = (), kind: str | None = None
) -> tuple[dict, dict[str, Slice]]:
    """The JSON object under `key` in the header's metadata, and every tensor's place.

    Args:
        versions: supported values of the object's "version"; () for objects without one.
        kind: the expected kind of file, for the message.
    Raises:
        ValueError: as in read_header; or if the file is of another kind, damaged, or of another version.
    """
    metadata, slices = read_header(file)
    if key not in metadata:
        raise ValueError(
            f"{file.name}: expected {key} in its metadata, got {brief(sorted(metadata))}; this is not"
            f" a {kind or f'{key} file'}"
        )
    found = parse_json(metadata[key], file.name)
    if not isinstance(found, dict):
        what = "an object with its format version" if versions else "an object"
        raise ValueError(f"{file.name}: expected {what} as {key}, got {brief(found)}")
    got = found.get("version")
    if versions and (type(got) is not int or got not in versions):
        known = " or ".join(map(str, versions))
        raise ValueError(f"{file.name}: expected version {known}, got {brief(got)}")
    return found, slices


def open_tensors(
    stack: contextlib.ExitStack, path: Path
) -> tuple[dict[str, Slice], Callable[[str], torch.Tensor]]:
    """Every tensor's place, and a function that reads a tensor by key while the stack is open."""
    file = stack.enter_context(open_regular(path))
    _, slices = read_header(file)
    return slices, lambda key: read_tensor(file, slices[key])


def places_in_memory(state: Mapping[str, torch.Tensor]) -> dict[str, Slice]:
    """Places of these tensors as from read_header, with begin 0."""
    return {
        key: Slice(_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape), 0, t.nbytes)
        for key, t in state.items()
    }


def read_tensors(
    file: BinaryIO, slices: dict[str, Slice], wanted: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a file, which must have the keys and shapes of `wanted` and be finite in its dtypes.

    Args:
        wanted: {key: tensor with the shape and dtype to read}, preferably on meta.
    Returns:
        {key: new tensor on the CPU}.
    Raises:
        ValueError: if they do not match; every problem is listed, before anything is read.
    """
    problems = [f"{key}: missing" for key in wanted if key not in slices]
    problems += [f"{ascii(key)[:200]}: not in the model" for key in slices if key not in wanted]
    for key in wanted.keys() & slices.keys():
        shape, (dtype, saved, *_) = tuple(wanted[key].shape), slices[key]
        if saved != shape:
            problems.append(f"{key}: expected {shape}, got {saved}")
        if dtype not in (fit := fitting(wanted[key].dtype)):
            problems.append(f"{key}: expected one of {fit}, got {ascii(dtype)[:50]}")
    raise_all("adapter: expected the tensors of the model", problems)
    return {key: _finite(file, key, slices[key], t.dtype) for key, t in wanted.items()}


def fitting(dtype: torch.dtype) -> list[str]:
    """Names of the file dtypes that can be read into a tensor of this dtype."""
    whole = [name for name, known in WHOLE_NUMBERS.items() if known == dtype]
    return whole or list(DTYPES)


def raise_all(expected: str, problems: Iterable[str]) -> None:
    """Raise ValueError with one line per problem, if there is any."""
    if problems:
        raise ValueError(f"{expected}, got\n  " + "\n  ".join(sorted(problems)))


def _finite(file, key, place, dtype):
    """Read a tensor and check that it is finite after conversion; aminmax needs no memory."""
    tensor = read_tensor(file, place, dtype)
    bounds = tensor.aminmax() if tensor.is_floating_point() and tensor.numel() else ()
    if not all(math.isfinite(bound.item()) for bound in bounds):
        raise ValueError(f"{key}: expected finite values in {dtype}, got NaN or infinity")
    return tensor


def read_tensor(file: BinaryIO, place: Slice, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Read one tensor to the CPU, in its own dtype or in `dtype`.

    Raises:
        ValueError: if the file has been truncated.
    """
    saved = _KNOWN[place.dtype]
    if saved == torch.bool:  # a byte may be neither 0 nor 1
        return read_tensor(file, place._replace(dtype="U8")) != 0
    tensor = torch.empty(place.shape, dtype=dtype or saved)
    flat, step = tensor.view(-1), CHUNK // saved.itemsize
    file.seek(place.begin)
    if tensor.dtype == saved:
        _fill(file, place, flat)
        return tensor
    for part in flat.split(step):
        chunk = torch.empty(len(part), dtype=saved)
        _fill(file, place, chunk)
        part.copy_(chunk)
    return tensor


def _fill(file, place, flat):
    buffer = flat.view(torch.uint8).numpy()
    if file.readinto(buffer) != buffer.nbytes:
        raise ValueError(f"{file.name}: expected {place.nbytes} bytes at {place.begin}, got fewer")


def parse_json(text: str | bytes, name: str):
    """Parse JSON; raises ValueError for NaN, duplicate keys or too deep nesting."""
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected JSON, got {type(error).__name__}: {error}") from None


def _slice(name, key, entry, start, size):
    where = f"{name}: {ascii(key)[:200]}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_sizes(shape, size) and _sizes(offsets, size) and isinstance(dtype, str)):
        raise ValueError(f"{where}: expected sizes between 0 and the file's {size} bytes")
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise ValueError(f"{where}: expected at most {MAX_DIMENSIONS} dimensions and two offsets")
    nbytes = offsets[1] - offsets[0]
    if nbytes < 0 or (dtype in _KNOWN and math.prod(shape) * _KNOWN[dtype].itemsize != nbytes):
        raise ValueError(f"{where}: expected the bytes of {dtype} {shape}, got {nbytes}")
    return Slice(dtype, tuple(shape), start + offsets[0], nbytes)


def _sizes(values, limit):
    return isinstance(values, list) and all(type(n) is int and 0 <= n <= limit for n in values)


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


def _unique(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result
