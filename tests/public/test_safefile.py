"""The safetensors container: the format as other readers see it, and the ways a file may be invalid."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lora_moe import safefile

ROOT = Path(__file__).parents[2]
TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b.c": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "d": torch.tensor([[0.1]], dtype=torch.float64),
    "e": torch.tensor([3.0], dtype=torch.float16),
    "empty": torch.zeros(0, 4),
}
METADATA = {"format": "pt", "note": "ü"}


def read_all(path):
    with safefile.open_regular(path) as file:
        metadata, slices = safefile.read_header(file)
        return metadata, {key: safefile.read_tensor(file, s) for key, s in slices.items()}


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key


def test_what_we_write_others_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safefile.write(path, TENSORS, METADATA)
    assert_same(safetensors.torch.load_file(path), TENSORS)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_what_others_write_we_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(TENSORS, path, METADATA)
    metadata, tensors = read_all(path)
    assert metadata == METADATA
    assert_same(tensors, TENSORS)
    tensors["a"] += 1  # memory of its own
    assert_same(read_all(path)[1], TENSORS)


# --- damaged and hostile files -------------------------------------------------------------------


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
    """Many small objects are the worst that fits."""
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


# --- what is opened ------------------------------------------------------------------------------


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
    monkeypatch.setattr(os, "lstat", lambda path: real)  # what the first look saw
    with pytest.raises((ValueError, OSError)) as error:
        safefile.open_regular(path)
    if isinstance(error.value, OSError):
        assert error.value.errno == errno.ELOOP


class Bomb:
    """A pickle that leaves a trace when it is loaded."""

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


# --- writing is all or nothing -------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "x.safetensors"
    safefile.write(path, TENSORS, METADATA)
    old = path.read_bytes()

    def disk_full(*args):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, step, disk_full)
    with pytest.raises(OSError, match="no space"):
        safefile.write(path, {"a": torch.ones(3)}, {})
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


def in_a_child(code, *args):
    """A process of its own, for limits and users that cannot be taken back; returns what it printed."""
    code = "import os, resource, sys, torch\nfrom lora_moe import safefile\n" + code
    environment = os.environ | {"LORA_MOE_BACKEND": "reference", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WRITE = """
try:
    safefile.write(safefile.path_in(sys.argv[1], "x.safetensors"), {"a": torch.ones(10_000)}, {})
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("size", [0, 7, 100, 4096, 40_000])
def test_a_file_size_limit_leaves_the_old_file(tmp_path, size):
    path = tmp_path / "x.safetensors"
    safefile.write(path, TENSORS, METADATA)
    old = path.read_bytes()
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    assert "File too large" in in_a_child(limit + WRITE, tmp_path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become someone else")
@pytest.mark.parametrize("mode", [0o555, 0o333, 0o000])
def test_a_folder_that_is_not_ours_to_write(tmp_path, mode):
    """0o333: could be written, but not flushed."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o777)
    for parent in (folder, *folder.parents[:-2]):
        parent.chmod(0o755)
    folder.chmod(mode)
    said = in_a_child("os.setuid(65534)" + WRITE, folder)
    assert said.startswith("PermissionError") and str(folder) in said
    assert os.listdir(folder) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        safefile.path_in(tmp_path / "file/folder", "x.safetensors")


@pytest.mark.parametrize("exists", [True, False])
def test_the_path_of_the_file_in_place_of_the_directory(tmp_path, exists):
    path = tmp_path / "x.safetensors"
    if exists:
        safefile.write(path, TENSORS, METADATA)
        with pytest.raises(NotADirectoryError, match=f"pass the directory: {tmp_path}"):
            safefile.open_in(path, "x.safetensors")
    with pytest.raises(NotADirectoryError, match=f"pass the directory: {tmp_path}"):
        safefile.path_in(path, "x.safetensors")
    assert os.listdir(tmp_path) == ["x.safetensors"] * exists


def test_a_directory_without_the_file_says_what_is_there(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"found \['adapter_config.json'\]; PEFT's"):
        safefile.open_in(tmp_path, "x.safetensors", {"adapter_config.json": "PEFT's"})
    with pytest.raises(FileNotFoundError, match="found nothing"):
        safefile.open_in(tmp_path / "nothing", "x.safetensors")


BAD = {
    "shared": (lambda t: {"a": t, "b": t}, "a: expected memory of its own, .* with b"),
    "overlapping": (lambda t: {"b": t[:6], "a": t[5:]}, "b: expected memory .* with a"),
    "all inside": (lambda t: {"b": t, "a": t[5:6]}, "b: expected memory .* with a"),
    "on meta": (lambda t: {"a": t.to("meta")}, "a: expected values to save"),
    "float8": (
        lambda t: {"a": t.to(torch.float8_e4m3fn)},
        "a: expected a dense tensor .* got torch.float8_e4m3fn",
    ),
    "complex": (lambda t: {"a": t.to(torch.complex64)}, "a: expected a dense tensor"),
    "sparse": (lambda t: {"a": t.to_sparse()}, "a: expected a dense tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_could_not_be_read_back_are_not_written(tmp_path, name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        safefile.write(tmp_path / "x.safetensors", make(torch.arange(10.0)), {})
    assert os.listdir(tmp_path) == []


def test_tensors_that_lie_side_by_side_in_one_memory_are_written(tmp_path):
    flat = torch.arange(12.0, requires_grad=True)
    tensors = {"a": flat[:5], "b": flat[5:9].view(2, 2), "c": flat[9:], "d": flat.view(3, 4).T}
    safefile.write(tmp_path / "x.safetensors", tensors, METADATA)
    assert_same(safetensors.torch.load_file(tmp_path / "x.safetensors"), tensors)


# --- what killed writes leave --------------------------------------------------------------------

KILLED = """
import signal
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
os.fsync = die
safefile.write(safefile.path_in(sys.argv[1], "x.safetensors"), {"a": torch.ones(10_000)}, {})
"""


def test_a_later_write_removes_what_a_killed_one_left(tmp_path):
    with pytest.raises(AssertionError):
        in_a_child(KILLED, tmp_path)
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".tmp")
    safefile.write(tmp_path / "x.safetensors", TENSORS, METADATA)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_only_abandoned_files_of_ours_are_removed(tmp_path):
    kept = {
        "another's": ".y.safetensors.0123456789abcdef.tmp",
        "another name": ".x.safetensors.0123456789abcdeg.tmp",
        "longer": ".x.safetensors.0123456789abcdef0.tmp",
        "not hidden": "x.safetensors.0123456789abcdef.tmp",
    }
    for name in kept.values():
        (tmp_path / name).touch()
    pattern = ".x.safetensors.{:016x}.tmp"
    (tmp_path / pattern.format(1)).mkdir()
    (tmp_path / pattern.format(2)).symlink_to(tmp_path / kept["another's"])
    os.mkfifo(tmp_path / pattern.format(3))
    (tmp_path / pattern.format(4)).touch()  # abandoned
    with open(tmp_path / pattern.format(5), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        safefile.write(tmp_path / "x.safetensors", TENSORS, METADATA)
    left = set(os.listdir(tmp_path)) - {"x.safetensors", *kept.values()}
    assert left == {pattern.format(i) for i in (1, 2, 3, 5)}
    assert len(os.listdir(tmp_path)) == len(kept) + 5


@pytest.mark.parametrize("when", ["before the lock", "holding the lock"])
def test_a_cleaner_that_is_faster_than_the_lock(tmp_path, monkeypatch, when):
    path, flock, seen = tmp_path / "x.safetensors", fcntl.flock, []

    def raced(file, how):
        if seen:
            return flock(file, how)
        seen.append(file.name)
        os.unlink(file.name)
        if when == "holding the lock":
            raise BlockingIOError(errno.EAGAIN, "held")
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", raced)
    safefile.write(path, TENSORS, METADATA)
    assert_same(read_all(path)[1], TENSORS)
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    left = tmp_path / ".x.safetensors.0123456789abcdef.tmp"
    left.touch()
    safefile.write(tmp_path / "x.safetensors", TENSORS, METADATA)
    assert sorted(os.listdir(tmp_path)) == [left.name, "x.safetensors"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to own a file that another user left")
def test_another_users_file_stays(tmp_path):
    left = tmp_path / ".x.safetensors.0123456789abcdef.tmp"
    left.touch()
    os.chown(left, 65534, 65534)
    safefile.write(tmp_path / "x.safetensors", TENSORS, METADATA)
    assert left.exists()


def test_a_write_holds_its_file_until_it_is_in_place(tmp_path, monkeypatch):
    """A second write in the middle of a first one does not take its temporary file for abandoned."""
    path, fsync = tmp_path / "x.safetensors", os.fsync

    def write_another(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        safefile.write(path, {"second": torch.ones(3)}, {})
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", write_another)
    safefile.write(path, TENSORS, METADATA)
    assert_same(read_all(path)[1], TENSORS)
    assert os.listdir(tmp_path) == [path.name]


def test_a_write_is_flushed_before_it_replaces(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a)))
    safefile.write(tmp_path / "x.safetensors", TENSORS, METADATA)
    assert events == ["fsync", "replace", "fsync"]  # the file, then its directory


def test_a_write_replaces_a_link_and_not_its_target(tmp_path):
    target, path = tmp_path / "precious", tmp_path / "x.safetensors"
    target.write_text("precious")
    path.symlink_to(target)
    safefile.write(path, TENSORS, METADATA)
    assert target.read_text() == "precious" and not path.is_symlink()


def test_a_header_that_would_not_load_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    safefile.write(path, TENSORS, METADATA)
    monkeypatch.setattr(safefile, "MAX_HEADER", 100)
    with pytest.raises(ValueError, match="header"):
        safefile.write(path, TENSORS, METADATA)
    monkeypatch.undo()
    assert_same(read_all(path)[1], TENSORS)
