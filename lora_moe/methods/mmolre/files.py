"""Saves and loads an MMoLRE model in one safetensors file."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from ... import safefile
from ...fields import expect
from .block import UniTSE
from .config import MMoLREConfig
from .model import MMoLRE


def save(model: MMoLRE, path: str | os.PathLike) -> None:
    """Write configuration and weights to one safetensors file, atomically.

    Args:
        path: path of the file, not of a directory.
    Raises:
        ValueError: if a parameter cannot be saved, such as one on meta.
        OSError: if the file cannot be written; an existing one is unchanged.
    """
    safefile.write_described(Path(path), model.state_dict(), "mmolre", model.config.to_dict())


def load(path: str | os.PathLike) -> MMoLRE:
    """Load a saved model, on the CPU and in evaluation mode; the file is untrusted.

    Raises:
        ValueError: if the file is damaged, is not an MMoLRE model, or has tensors that do not match its
            configuration or values that are not finite.
        OSError: if it is missing or cannot be read.
    """
    with safefile.open_regular(Path(path)) as file:
        found, slices = safefile.read_described(file, "mmolre")
        config = MMoLREConfig.from_dict(found)
        blocks = config.blocks * len(config.modalities)
        expect(blocks <= len(slices), str(path), f"tensors of {blocks} blocks", len(slices))
        shapes = _shapes(config)
        found = {name: s.shape for name, s in slices.items() if s.dtype in safefile.DTYPES}
        differ = {n for n in shapes.keys() | slices.keys() if shapes.get(n) != found.get(n)}
        expect(not differ, str(path), "the tensors of its configuration", sorted(differ))
        wanted = {
            name: torch.empty(shape, dtype=safefile.DTYPES[slices[name].dtype], device="meta")
            for name, shape in shapes.items()
        }
        tensors = safefile.read_tensors(file, slices, wanted)
    with torch.device("meta"):  # the file's tensors become the parameters, without a second copy
        model = MMoLRE(config)
    model.load_state_dict(tensors, assign=True)
    for module in model.modules():
        if isinstance(module, UniTSE):
            module.expert_of_row = module._expert_of_row()
    return model.eval()


def _shapes(config):
    """{name: shape} of a model's parameters; blocks of a modality are equal, so only one is built."""
    with torch.device("meta"):
        first = MMoLRE(dataclasses.replace(config, blocks=1)).state_dict()
    shapes = {}
    for name, tensor in first.items():
        kind, _, rest = name.partition(".")
        modality, _, rest = rest.partition(".0.")
        more = range(config.blocks if kind == "encoders" else 0)
        names = [f"{kind}.{modality}.{block}.{rest}" for block in more] or [name]
        shapes |= dict.fromkeys(names, tuple(tensor.shape))
    return shapes
