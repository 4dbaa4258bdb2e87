"""Argument validation of MMoLRE; messages name the argument, what was expected, and the value."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...fields import expect

MAX_NAMES = 64  # modalities, tasks, experts, blocks


def expect_mask(name, mask, shape):
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"{name}: expected bool {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}"
        )


def number(name, value, high):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    expect(number and 0 <= value <= high, name, f"a number in [0, {high:g}]", value)


def named(name, entries):
    expect(isinstance(entries, Mapping), name, "a dict with names as keys", entries)
    expect(1 <= len(entries) <= MAX_NAMES, name, f"1 to {MAX_NAMES} entries", len(entries))
    for key in entries:  # they name submodules
        fits = isinstance(key, str) and key.isidentifier() and not hasattr(nn.ModuleDict, key)
        expect(fits, name, "names that are valid in a ModuleDict", key)
    return dict(entries)
