"""Saves and loads C-LoRAE's experts, gates and visual adapters in one file."""

from __future__ import annotations

import os
from pathlib import Path
from reprlib import repr as brief

import torch
from torch import nn

from ... import safefile
from .adapters import layers_of
from .visual import GatedVisual

FILE_NAME = "c_lorae.safetensors"
FORMAT_VERSION = 1


def save(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Write experts, gates and visual adapters to directory/c_lorae.safetensors, atomically.

    Raises:
        ValueError: if the model has none of these.
        OSError: if the file cannot be written; an existing one is unchanged.
    """
    tensors, path = _keyed(model), safefile.path_in(directory, FILE_NAME)
    safefile.write_described(path, tensors, "c_lorae", _describe(model))
    return path


@torch.no_grad()
def load(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Load a saved file into a model prepared in the same way (inject, add_visual).

    Paths, ranks, gates and shapes in the file must match the model, which keeps its dtypes.

    Raises:
        ValueError: if the file is damaged, is not ours, does not fit the model (every mismatch is listed)
            or has NaN or infinite values.  The model is unchanged.
        OSError: if the file cannot be read.
    """
    wanted, expected = _keyed(model), _describe(model)
    with safefile.open_in(directory, FILE_NAME) as file:
        found, slices = safefile.read_described(file, "c_lorae", [FORMAT_VERSION])
        _expect_same(file.name, found, expected)
        values = safefile.read_tensors(file, slices, wanted)
    for key, tensor in wanted.items():
        tensor.copy_(values.pop(key))
    return model


def _trained(model):
    visual = {name: m for name, m in model.named_modules() if isinstance(m, GatedVisual)}
    modules = layers_of(model) | visual
    if not modules:
        raise ValueError("model: expected C-LoRAE's experts or GatedVisual modules, got none")
    return modules


def _keyed(model):
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in _trained(model).items()
        for name, tensor in module.adapter_state().items()
    }


def _describe(model):
    """The JSON description in the file."""
    modules = {}
    for path, module in _trained(model).items():
        if isinstance(module, GatedVisual):
            modules[path] = {"visual": module.mode, "heads": module.heads}
        else:
            c = module.config
            gate = c.router.gate
            modules[path] = {"ranks": list(c.ranks), "scales": list(c.scales), "gate": gate}
    return {"version": FORMAT_VERSION, "modules": modules}


def _expect_same(name, found, expected):
    saved = found.get("modules")
    if not isinstance(saved, dict):
        raise ValueError(f"{name}: expected modules in its description")
    own = expected["modules"]
    problems = [
        f"{ascii(path)[:200]}: the model has {own.get(path)}, the file {brief(saved.get(path))}"
        for path in own.keys() | saved.keys()
        if own.get(path) != saved.get(path)
    ]
    safefile.raise_all(f"{name}: expected the modules of the model", problems)
