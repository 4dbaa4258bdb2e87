"""Writing a safetensors file leaves the old file or the new one, complete, and nothing beside it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lora_moe import safefile

from ..support.containers import METADATA, TENSORS, assert_same, read_all

ROOT = Path(__file__).parents[2]


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
    """Runs code in a child process, for limits and users that cannot be undone; returns its output."""
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
    """0o333 can be written but not flushed."""
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
    "shared": (lambda t: {"a": t, "b": t}, "a: expected tensors that share no memory, .* with b"),
    "overlapping": (
        lambda t: {"b": t[:6], "a": t[5:]},
        "b: expected tensors that share no memory, .* with a",
    ),
    "all inside": (
        lambda t: {"b": t, "a": t[5:6]},
        "b: expected tensors that share no memory, .* with a",
    ),
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
    """A concurrent write does not mistake the first write's temporary file for an abandoned one."""
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
