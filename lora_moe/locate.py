"""Finds an adapter's files in a directory or in a Hugging Face Hub repository.

The hub is used only if there is no file or directory of that name.  Downloaded files are as untrusted as
any other file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def find(
    source: str | os.PathLike, choices: Sequence[tuple[str, ...]], revision: str | None = None
) -> tuple[Path, ...] | None:
    """The paths of the first choice whose files all exist, or None if the directory has no choice.

    Args:
        source: a directory, or "owner/name" of a repository.
        choices: tuples of file names that belong together, preferred first.
        revision: branch, tag or commit of a repository.
    Raises:
        ValueError: if a revision is given for a directory.
        FileNotFoundError: if there is no directory and no repository with such files.
        ImportError: if source is a repository and huggingface_hub is not installed.
    """
    if is_repository(source):
        return _downloaded(source, choices, revision)
    if revision is not None:
        raise ValueError(
            f"revision: expected None for {os.fspath(source)}, which is not a repository, got {revision!r}"
        )
    folder = Path(source)
    paths = (tuple(folder / name for name in names) for names in choices)
    return next((found for found in paths if all(map(os.path.lexists, found))), None)


def is_repository(source: str | os.PathLike) -> bool:
    """Whether a string names a repository: "owner/name", and there is no such path on disk."""
    named = isinstance(source, str) and _REPOSITORY.fullmatch(source)
    return bool(named) and not os.path.lexists(source)


def _downloaded(repository, choices, revision):
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise ImportError(
            f"{repository}: no such directory, and loading from the Hugging Face Hub requires"
            " huggingface_hub; run pip install huggingface_hub"
        ) from None
    for names in choices:
        try:
            # the cache has symbolic links to content-addressed files
            return tuple(
                Path(hf_hub_download(repository, name, revision=revision)).resolve()
                for name in names
            )
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{repository}: expected a directory or a Hugging Face Hub repository"
                f"{f' with revision {revision!r}' if revision else ''}, got neither"
                f" ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
            ) from error
    wanted = ", or ".join(" and ".join(names) for names in choices)
    raise FileNotFoundError(
        f"{repository}: expected a directory, or a Hugging Face Hub repository with {wanted};"
        " found neither on the hub nor in its cache"
    )
