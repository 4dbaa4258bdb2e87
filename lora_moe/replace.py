"""Replaces a file atomically: writes a temporary file in the same folder, syncs it, and renames it.

After a crash there is the old or the new file, and at worst a temporary one.  The writer holds a lock on the
temporary file, which ends with the process; a later write removes temporary files that are not locked.
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
    """Open a file for writing, which replaces `path` when the block ends without an error.

    Raises:
        OSError: if it cannot be written; an existing file is unchanged.
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
    """Remove temporary files of killed writes of `path`: matching name and owner, and not locked."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    with os.scandir(path.parent) as entries:
        found = [Path(entry.path) for entry in entries if name.fullmatch(entry.name)]
    for temporary in found:
        with suppress(OSError):  # it is another user's, locked, or already removed
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
    """A locked temporary file next to `path`, removed at the end unless it was renamed."""
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
    """Lock the file; False if another process's cleanup has locked or removed it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_nlink > 0
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks, so no cleanup removes it
        return True
