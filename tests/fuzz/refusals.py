"""Runs loaders within bounds of time and memory, and checks which exceptions they raise."""

from __future__ import annotations

import pytest
import torch

from ..support.cost import measured
from .loaders import DOCUMENTED, LOADERS

every_loader = pytest.mark.parametrize("name", LOADERS)


def refuse(loader, path, width=8):
    """The loader's error message; asserts that it stays within the bounds and leaves the model unchanged."""
    model = loader.fresh(width)
    before = state(model)
    error = read_or_refuse(loader, path, model)
    assert error is not None
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    return str(error)


def read_or_refuse(loader, path, model):
    """Loads within the bounds; returns the exception, if any, which must be a documented one."""
    error = None
    with measured() as cost:
        try:
            loader.load(model, path.parent)
        except DOCUMENTED as caught:
            error = caught
            assert str(error)
    assert cost.seconds < 1, f"{cost.seconds:.1f} s"
    assert cost.rise <= 2 * path.stat().st_size + (64 << 20), f"{cost.rise >> 20} MB"
    return error


def state(model):
    return {} if model is None else {k: v.clone() for k, v in model.state_dict().items()}
