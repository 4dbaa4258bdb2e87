"""Saves that are killed, interrupted or out of disk space leave the old or the new file intact."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import time

import pytest
import torch

from .loaders import LOADERS, NIGHTLY, SAVERS, saved

STOPS = 8 * NIGHTLY
INTERRUPTED = 42  # exit status of an interrupted child


def save_over_and_over(loader, models, folder):
    """Saves repeatedly in a forked process, which starts faster than a new interpreter; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        while True:
            for model in models:
                loader.save(model, folder)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    finally:
        os._exit(1)


@pytest.mark.parametrize("name", SAVERS)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_saves_that_are_stopped(name, how, tmp_path):
    """A save stopped at a random time leaves a file that loads, and the next save removes temporary files.

    An interrupted save also removes them, unless the interrupt hits the cleanup itself.
    """
    loader, rng, width = LOADERS[name], random.Random(name), 4000
    saved(loader, tmp_path, width)
    whole = sorted(os.listdir(tmp_path))
    models = [loader.model(width) for _ in range(2)]
    beside = 0
    for _ in range(STOPS):
        pid = save_over_and_over(loader, models, tmp_path)
        time.sleep(0.05 + rng.random() * 0.1)
        os.kill(pid, how)
        _, status = os.waitpid(pid, 0)
        if how == signal.SIGKILL:
            assert os.WTERMSIG(status) == signal.SIGKILL
        else:
            assert os.WEXITSTATUS(status) == INTERRUPTED
            beside += sorted(os.listdir(tmp_path)) != whole
        loader.load(loader.fresh(width), tmp_path)
    assert beside <= STOPS // 4
    saved(loader, tmp_path, width)
    assert sorted(os.listdir(tmp_path)) == whole


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of 256 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip(f"mounting is refused: {done.stderr.strip() if done else 'needs root'}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("name", SAVERS)
def test_a_full_disk(name, small_disk):
    """If the new file does not fit, the old one is kept, and saving works again later."""
    loader = LOADERS[name]
    path = saved(loader, small_disk)
    old, whole = path.read_bytes(), set(os.listdir(small_disk))
    fill = small_disk / "fill"
    with pytest.raises(OSError), open(fill, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    torch.manual_seed(1)
    with pytest.raises(OSError) as error:
        loader.save(loader.model(8), small_disk)
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == old and set(os.listdir(small_disk)) == whole | {"fill"}
    fill.unlink()
    loader.save(loader.model(8), small_disk)
    loader.load(loader.fresh(8), small_disk)
