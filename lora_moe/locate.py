"""Where an adapter's files lie: in a directory, or in a repository of the hub.

A repository is asked for only where there is no file or directory of that name.  What comes from it is
read by the same rules as any other file.
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
    """The paths of the first choice whose files are all there; None if the directory has none of them.

    Args:
        source: a directory, or "owner/name" of a repository.
        choices: names of files that belong together, the best first.
        revision: of a repository: branch, tag or commit.
    Raises:
        ValueError: a revision of a directory.
        FileNotFoundError: there is neither a directory nor a repository with such files.
        ImportError: a repository, and huggingface_hub is not installed.
    """
    if is_repository(source):
        return _downloaded(source, choices, revision)
    if revision is not None:
        raise ValueError(
            f"revision: expected None for {os.fspath(source)}, which is no repository, got {revision!r}"
        )
    folder = Path(source)
    paths = (tuple(folder / name for name in names) for names in choices)
    return next((found for found in paths if all(map(os.path.lexists, found))), None)


def is_repository(source: str | os.PathLike) -> bool:
    """Whether a string names a repository: "owner/name", and nothing on the disk is called so."""
    named = isinstance(source, str) and _REPOSITORY.fullmatch(source)
    return bool(named) and not os.path.lexists(source)


def _downloaded(repository, choices, revision):
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise ImportError(
            f"{repository}: there is no such directory, and a repository of the hub needs"
            " huggingface_hub; pip install huggingface_hub"
        ) from None
    for names in choices:
        try:
            # in the cache they are links to files that are named by their content
            return tuple(
                Path(hf_hub_download(repository, name, revision=revision)).resolve()
                for name in names
            )
        except EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{repository}: expected a directory or a repository of the hub"
                f"{f' with revision {revision!r}' if revision else ''}, got neither"
                f" ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
            ) from error
    wanted = ", or ".join(" and ".join(names) for names in choices)
    raise FileNotFoundError(
        f"{repository}: expected a directory, or a repository of the hub that holds {wanted};"
        " found neither on the hub nor in its cache"
    )
