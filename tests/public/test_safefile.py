"""Reading safetensors files: interchange with the safetensors package, and invalid files."""

from __future__ import annotations

import errno
import json
import os
import pickle
import time
import tracemalloc

import pytest
import safetensors.torch
import torch

from lora_moe import safefile

from ..support.containers import METADATA, TENSORS, assert_same, read_all


def test_safetensors_reads_our_files(tmp_path):
    path = tmp_path / "x.safetensors"
    safefile.write(path, TENSORS, METADATA)
    assert_same(safetensors.torch.load_file(path), TENSORS)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_we_read_files_of_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(TENSORS, path, METADATA)
    metadata, tensors = read_all(path)
    assert metadata == METADATA
    assert_same(tensors, TENSORS)
    tensors["a"] += 1  # the tensor owns its memory
    assert_same(read_all(path)[1], TENSORS)


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin, end, shape=None, dtype="F32", **more):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


HOSTILE = {
    "no-bytes": b"",
    "half-a-length": b"\x10\0\0",
    "length-beyond-the-file": raw({"a": entry(0, 4)}, length=10_000),
    "length-beyond-memory": raw({}, b"x" * 100, length=2**62),
    "length-negative": raw({}, length=2**64 - 1),
    "length-zero": raw({}, length=0),
    "no-json": raw(b"{" * 40),
    "no-utf-8": raw(b'{"\xff\xfe": 1}'),
    "not-an-object": raw([1, 2]),
    "nan-in-json": raw(b'{"a": NaN}'),
    "key-twice": raw(b'{"a": %b, "a": %b}' % (2 * (json.dumps(entry(0, 4)).encode(),)), bytes(4)),
    "depth": raw(b'{"a":' * 100_000),
    "depth-lists": raw(b"[" * 100_000 + b"]" * 100_000),
    "depth-in-blanks": raw((b"[" + b" " * 12) * 100_000),
    "giant-number": raw(b'{"a": ' + b"9" * 100_000 + b"}"),
    "entry-no-object": raw({"a": 3}),
    "entry-short": raw({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "entry-with-more": raw({"a": entry(0, 4, pickle="x")}, bytes(4)),
    "dtype-no-string": raw({"a": entry(0, 4, dtype=[])}, bytes(4)),
    "shape-too-small": raw({"a": entry(0, 8, shape=[1])}, bytes(8)),
    "shape-negative": raw({"a": entry(0, 4, shape=[-1, -1])}, bytes(4)),
    "shape-bool": raw({"a": entry(0, 4, shape=[True])}, bytes(4)),
    "shape-float": raw({"a": entry(0, 4, shape=[1.0])}, bytes(4)),
    "shape-overflows": raw({"a": entry(0, 0, shape=[2**32, 2**32])}),
    "shape-many-dimensions": raw({"a": entry(0, 4, shape=[1] * 9)}, bytes(4)),
    "offsets-three": raw({"a": entry(0, 4) | {"data_offsets": [0, 4, 4]}}, bytes(4)),
    "offsets-backwards": raw({"a": entry(0, 4) | {"data_offsets": [4, 0]}}, bytes(4)),
    "offsets-there-and-back": raw({"a": entry(0, 16), "b": entry(16, 8, [], "I8")}, bytes(8)),
    "offsets-beyond-the-file": raw({"a": entry(0, 400)}, bytes(4)),
    "truncated": raw({"a": entry(0, 8)}, bytes(7)),
    "trailing": raw({"a": entry(0, 8)}, bytes(9)),
    "overlap": raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "same-bytes-twice": raw({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "gap": raw({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "late-start": raw({"a": entry(4, 8)}, bytes(8)),
    "pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with safefile.open_regular(path) as file, pytest.raises(ValueError, match=r"x\.safetensors"):
        safefile.read_header(file)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    safefile.write(path, TENSORS, METADATA)
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError):
            read_all(path)


@pytest.mark.parametrize("kind", ["declared", "real"])
def test_giant_headers_cost_neither_time_nor_memory(tmp_path, kind):
    path, size = tmp_path / "x.safetensors", 64 << 20
    with open(path, "wb") as file:
        file.write((size - 8 if kind == "real" else 2**40).to_bytes(8, "little"))
        file.write(b'{"a":' + b"[" * 100)
        file.truncate(size)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ValueError, match="header of at most"):
        read_all(path)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and peak < 1 << 20


@pytest.mark.parametrize("filler", [b"[],", b'{"":[]},', b"[],          ", b"1,", b'"",'])
def test_the_largest_header_allowed_is_parsed_in_time(tmp_path, filler):
    """Many small objects are the worst case that fits."""
    path = tmp_path / "x.safetensors"
    text = b'{"a":[' + filler * ((safefile.MAX_HEADER - 10) // len(filler)) + b"0]}"
    path.write_bytes(raw(text))
    start = time.process_time()
    with pytest.raises(ValueError, match="expected"):
        read_all(path)
    assert time.process_time() - start < 1


def test_a_header_of_many_short_names_is_read(tmp_path):
    tensors = {f"{i:x}": torch.zeros(()) for i in range(3000)}
    safefile.write(tmp_path / "x.safetensors", tensors, {})
    assert_same(read_all(tmp_path / "x.safetensors")[1], tensors)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safefile.write(path, {"a": torch.zeros(100_000)}, {})
    with safefile.open_regular(path) as file:
        _, slices = safefile.read_header(file)
        os.truncate(path, 2000)
        with pytest.raises(ValueError, match="got fewer"):
            safefile.read_tensor(file, slices["a"])


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    target = tmp_path / "real.safetensors"
    safefile.write(target, TENSORS, METADATA)
    link, pipe = tmp_path / "link.safetensors", tmp_path / "pipe.safetensors"
    dangling, folder = tmp_path / "dangling.safetensors", tmp_path / "folder.safetensors"
    link.symlink_to(target)
    dangling.symlink_to("/nowhere")
    os.mkfifo(pipe)
    folder.mkdir()

    def never(*args):
        raise AssertionError("opened")

    monkeypatch.setattr(os, "open", never)
    for path in (link, dangling, pipe, folder, type(target)("/dev/zero")):
        with pytest.raises(ValueError, match="expected a regular file"):
            safefile.open_regular(path)


@pytest.mark.parametrize("trick", ["link", "pipe"])
def test_a_file_swapped_after_the_check_is_refused(tmp_path, monkeypatch, trick):
    path, real = tmp_path / "x.safetensors", os.lstat(__file__)
    if trick == "link":
        path.symlink_to(__file__)
    else:
        os.mkfifo(path)
    monkeypatch.setattr(os, "lstat", lambda path: real)  # a regular file at the check
    with pytest.raises((ValueError, OSError)) as error:
        safefile.open_regular(path)
    if isinstance(error.value, OSError):
        assert error.value.errno == errno.ELOOP


class Bomb:
    """A pickle that leaves a trace when loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl", "x.safetensors"])
@pytest.mark.parametrize("writer", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_pickles_are_refused_without_being_loaded(tmp_path, name, writer):
    trap, path = tmp_path / "trap", tmp_path / name
    with open(path, "wb") as file:
        writer(Bomb(trap), file)
    with pytest.raises(ValueError, match="pickle"):
        read_all(path)
    assert not trap.exists()
