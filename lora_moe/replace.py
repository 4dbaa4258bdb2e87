"""A file replaced in one step: written beside the old one, flushed to the disk, renamed over it.

A crash leaves the old or the new file, and at worst a temporary one beside it.  Who writes holds a
lock on it, which ends with the process: a later write removes the temporary files that nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that takes the place of `path` when the block ends without an error.

    Raises:
        OSError: the folder or the disk does not take it; an older file is as it was.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_abandoned(path)
        with _temporary(path) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_abandoned(path: Path) -> None:
    """Temporary files that killed writes of `path` left: ours by name and owner, and nobody's lock."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    with os.scandir(path.parent) as entries:
        found = [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]
    for temporary in found:
        with suppress(OSError):  # another process wrote it, holds it or was faster: it stays
            _remove_unheld(temporary)


def _remove_unheld(temporary):
    descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(temporary)
    finally:
        os.close(descriptor)


@contextmanager
def _temporary(path):
    """A locked file beside `path`, gone in the end unless it was renamed."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:
                if _hold(file):
                    yield file
                    return
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


def _hold(file):
    """Whether the file is ours to write: a cleaner may have been faster, and removes it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_nlink > 0
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system: then no cleaner removes anything
        return True
