"""Source: a checkpoint's configuration, and its tensors by key, read on demand."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from reprlib import repr as brief
from typing import NamedTuple

import torch

from .. import peft_format, safefile
from .pickles import read_pickle

PICKLES = (".bin", ".pt", ".pth")
# the first pattern that matches files in the directory is used
_FILES = (
    r"adapter_model\.safetensors",
    r"adapter_model\.bin",
    r"model(-\d+-of-\d+)?\.safetensors",
    r"pytorch_model(-\d+-of-\d+)?\.bin",
)


class Source(NamedTuple):
    """An opened checkpoint folder or file.

    name     for messages
    config   adapter_config.json, {} if missing
    places   {key: dtype and shape}, as safefile.Slice
    read     key -> tensor in its own dtype
    beside   other files of the folder that may hold weights
    """

    name: str
    config: dict
    places: dict[str, safefile.Slice]
    read: Callable[[str], torch.Tensor]
    beside: tuple[str, ...] = ()

    def shape(self, key: str) -> tuple[int, ...]:
        return self.places[key].shape


def opened(stack: contextlib.ExitStack, source: str | os.PathLike) -> Source:
    """Open a checkpoint folder or a tensor file; files stay open until the stack closes.

    Raises:
        ValueError: if a file is damaged, or two have the same key.
        OSError: if a file is missing or cannot be read.
    """
    path = Path(source)
    paths = files_in(path) if path.is_dir() else [path]
    if not paths:
        raise FileNotFoundError(_nothing(path))
    config_file = (path if path.is_dir() else path.parent) / peft_format.CONFIG
    config = peft_format.read_config(config_file) if os.path.lexists(config_file) else {}
    places, readers = {}, {}
    for file in paths:
        own, read = _open(stack, file)
        if both := own.keys() & places.keys():
            raise ValueError(f"{file}: expected unique keys, got duplicates {brief(sorted(both))}")
        places |= own
        readers |= dict.fromkeys(own, read)
    taken = {file.name for file in paths}
    weights = (*PICKLES, ".safetensors", ".distcp")
    others = sorted(p.name for p in paths[0].parent.iterdir() if p.suffix in weights)
    beside = tuple(name for name in others if name not in taken)
    return Source(str(path), config, places, lambda key: readers[key](key), beside)


def files_in(folder: Path) -> list[Path]:
    """The files in the folder that match the first matching pattern of _FILES."""
    names = sorted(os.listdir(folder))
    for pattern in _FILES:
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return [folder / name for name in found]
    return []


def _nothing(folder):
    names, hint = sorted(os.listdir(folder)), ""
    if any(name.endswith(".distcp") for name in names):
        hint = (
            "; this is a distributed checkpoint: convert it to one file with torch's dcp_to_torch_save and"
            " pass that file"
        )
    return (
        f"{folder}: expected a checkpoint (adapter_model, model or pytorch_model as .safetensors or .bin) in"
        f" it, found {names[:20]}{hint}"
    )


def _open(stack, path):
    if path.suffix in PICKLES:
        state = read_pickle(path)
        return safefile.places_in_memory(state), state.__getitem__
    return safefile.open_tensors(stack, path)
