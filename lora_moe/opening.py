"""Opens untrusted adapter files safely: only regular files, with the expected name in a directory.

Symbolic links, devices, pipes and pickles raise before anything is read.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_regular(path: Path, pickles: bool = False) -> BinaryIO:
    """Open a regular file for reading; raises for a link, device or pipe before opening it.

    Args:
        pickles: whether to allow file names of pickles; opening does not run code.
    Raises:
        ValueError: if it is not a regular file, or has the name of a pickle.
        OSError: if it is missing or cannot be read.
    """
    if path.suffix in _PICKLES and not pickles:
        raise ValueError(
            f"{path}: expected a safetensors file; pickles run code and are not opened"
        )
    _expect_regular(path, os.lstat(path).st_mode)
    return open(path, "rb", opener=_descriptor)


def path_in(directory: str | os.PathLike, name: str) -> Path:
    """directory/name for a file to write; creates the directory if it does not exist.

    Raises:
        NotADirectoryError: if `directory` is a file, or the path of the file itself.
        OSError: if it cannot be created.
    """
    directory = Path(directory)
    if not directory.is_dir():
        if directory.name == name or os.path.lexists(directory):
            raise _not_a_directory(directory, name)
        directory.mkdir(parents=True, exist_ok=True)
    return directory / name


def open_in(
    directory: str | os.PathLike, name: str, hints: dict[str, str] | None = None
) -> BinaryIO:
    """open_regular(directory/name), or an error that lists the directory.

    Args:
        hints: {file name: explanation to add if the directory contains this file}.
    Raises:
        ValueError, OSError: as in open_regular.
    """
    directory = Path(directory)
    path = directory / name
    if os.path.lexists(path):
        return open_regular(path)
    if directory.is_dir():
        found = sorted(os.listdir(directory))
        known = "".join(f"; {hint}" for file, hint in (hints or {}).items() if file in found)
        raise FileNotFoundError(f"{directory}: expected {name} in it, found {found[:20]}{known}")
    if os.path.lexists(directory):
        open_regular(directory).close()  # raises for a pickle
        raise _not_a_directory(directory, name)
    raise FileNotFoundError(f"{directory}: expected a directory with {name} in it, found nothing")


def _not_a_directory(path, name):
    return NotADirectoryError(
        f"{path}: expected a directory that contains {name}, got a file;"
        f" pass the directory: {path.parent}"
    )


def _expect_regular(path, mode):
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else stat.filemode(mode)
        raise ValueError(f"{path}: expected a regular file, got {kind}; it was not read")


def _descriptor(path, flags):
    """Check again after opening, since the file may have been replaced since the first check."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _expect_regular(path, os.fstat(descriptor).st_mode)
    except ValueError:
        os.close(descriptor)
        raise
    return descriptor
