"""Safetensors files: written all or nothing, read as untrusted input.

    8 bytes  N, little-endian
    N bytes  JSON {key: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, ...}
    data     the tensors, one after the other

The reader opens nothing but a regular file, never through a symbolic link, and checks the header
against the file's size before it believes any of it: tensors must cover the data without a gap or
an overlap.  What it allocates is bounded by the header's limit and by the tensors that the caller
asks for; no pickle is ever loaded.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors.torch import save_file

MAX_HEADER = 2 << 20  # bytes: some 10,000 tensors
MAX_DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLE_MAGIC = (b"PK", b"\x80")  # torch.save's zip archive, and a bare pickle


class Slice(NamedTuple):
    """A tensor's place in a file."""

    dtype: str  # a key of DTYPES, or another name that the format knows
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    nbytes: int


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write beside the old file, flush to the disk, rename over it: a crash leaves one of the two.

    Raises:
        ValueError: the header would be larger than what read_header accepts.
        OSError: the file cannot be written; an older one is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        with open_regular(temporary) as file:
            read_header(file)  # never replace an old file by one that will not load
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a link, a device or a pipe is refused before it is opened.

    Raises:
        ValueError: it is not a regular file, or its name is a pickle's.
        OSError: it is missing or cannot be read.
    """
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path}: expected a safetensors file; pickles run code and are not opened"
        )
    _expect_regular(path, os.lstat(path).st_mode)
    return open(path, "rb", opener=_descriptor)


def read_header(file: BinaryIO) -> tuple[dict, dict[str, Slice]]:
    """The metadata and every tensor's place, checked against the size of the file.

    Raises:
        ValueError: truncated, overlapping, oversized, or no safetensors file at all.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        hint = " (this is a pickle)" if prefix.startswith(_PICKLE_MAGIC) else ""
        limit = f"a header of at most {MAX_HEADER} bytes inside a file of {size}"
        raise ValueError(f"{file.name}: expected {limit}, got {length} bytes{hint}")
    text = file.read(length)
    if text.count(b"[") + text.count(b"{") > length // 12 + 8:  # three in the 50 bytes of a tensor
        raise ValueError(f"{file.name}: expected a header of tensors, got one of empty brackets")
    header = parse_json(text, file.name)
    if not isinstance(header, dict):
        raise ValueError(
            f"{file.name}: expected a JSON object as header, got {type(header).__name__}"
        )
    metadata = header.pop("__metadata__", {})
    slices = {key: _slice(file.name, key, entry, 8 + length, size) for key, entry in header.items()}
    ends = sorted((s.begin, s.begin + s.nbytes) for s in slices.values())
    ends = [(0, 8 + length), *ends, (size, size)]
    if any(end != begin for (_, end), (begin, _) in pairwise(ends)):
        raise ValueError(f"{file.name}: expected tensors to fill the file without gaps or overlaps")
    return metadata, slices


def read_tensor(file: BinaryIO, place: Slice) -> torch.Tensor:
    """One tensor of read_header's, on the CPU.

    Raises:
        ValueError: the file has become shorter.
    """
    buffer = bytearray(place.nbytes)
    file.seek(place.begin)
    if file.readinto(buffer) != place.nbytes:
        raise ValueError(f"{file.name}: expected {place.nbytes} bytes at {place.begin}, got fewer")
    dtype = DTYPES[place.dtype]
    if not buffer:
        return torch.empty(place.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).view(place.shape)


def parse_json(text: str | bytes, name: str):
    """JSON without NaN, repeated keys or nesting beyond Python's limit; raises ValueError."""
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
    if nbytes < 0 or (dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != nbytes):
        raise ValueError(f"{where}: expected the bytes of {dtype} {shape}, got {nbytes}")
    return Slice(dtype, tuple(shape), start + offsets[0], nbytes)


def _sizes(values, limit):
    return isinstance(values, list) and all(type(n) is int and 0 <= n <= limit for n in values)


def _expect_regular(path, mode):
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else stat.filemode(mode)
        raise ValueError(f"{path}: expected a regular file, got {kind}; it was not read")


def _descriptor(path, flags):
    """Something else may have taken the file's place since it was looked at."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _expect_regular(path, os.fstat(descriptor).st_mode)
    except ValueError:
        os.close(descriptor)
        raise
    return descriptor


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


def _unique(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result
