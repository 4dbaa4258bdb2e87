"""The segmented plan's sort equals PyTorch's stable sort in each window, and a new T never recompiles it."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch

from ..support.interpreter import Sanitizer, interpreting

pytest.importorskip("triton")
INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
with interpreting() if INTERPRETED else contextlib.nullcontext():
    sort_file = importlib.import_module("lora_moe.triton_kernels.sort_tokens")
    tiles = importlib.import_module("lora_moe.triton_kernels.tiles")

SHAPES = {  # T, E, K
    "one token": (1, 4, 2),
    "a tile": (16, 4, 2),
    "one past a tile": (17, 4, 2),
    "a block": (64, 31, 1),
    "one past a block": (65, 32, 2),
    "a window": (256, 64, 2),
    "one past a window": (257, 8, 2),
    "many windows": (700, 33, 3),
    "many experts": (100, 300, 2),
    "one expert": (40, 1, 1),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def ids(T, E, K, skew=False):
    """Some of no expert: empty slots, and ids that no caller should pass."""
    g = torch.Generator().manual_seed(T)
    drawn = torch.randint(-1, E, (T, K), generator=g, dtype=torch.int32)
    if skew:
        drawn = torch.where(torch.rand(T, K, generator=g) < 0.8, 0, drawn)
    drawn[T // 2, 0] = E + 3
    drawn[0, -1] = torch.iinfo(torch.int32).min
    return drawn


def stable(key, window):
    """Order by key within each window."""
    parts = [torch.argsort(part, stable=True) for part in key.split(window)]
    return torch.cat([part + n * window for n, part in enumerate(parts)])


def watched():
    return Sanitizer() if INTERPRETED else contextlib.nullcontext()


@every_shape
@pytest.mark.parametrize("skew", [False, True])
def test_tokens_by_their_experts(shape, skew):
    T, E, _ = shape
    indices = ids(*shape, skew)
    with watched():
        order = sort_file.sort_tokens(indices.to(DEVICE), E, 16).cpu()
    known = torch.where((indices >= 0) & (indices < E), indices, E).long()[:, :2]
    key = known.amin(1) * (E + 1) + known.amax(1)
    want = torch.arange(T) if T <= 16 else stable(key, tiles.sort_window("token"))
    assert order.dtype == torch.int32
    assert torch.equal(order.long(), want)


@every_shape
def test_slots_by_their_expert(shape):
    E = shape[1]
    indices, window = ids(*shape), tiles.sort_window("slot")
    with watched():
        order, starts = (v.cpu() for v in sort_file.sort_slots(indices.to(DEVICE), E))
    key = torch.where((indices >= 0) & (indices < E), indices, E).long().flatten()
    assert torch.equal(order.long(), stable(key, window))
    counts = torch.stack([part.bincount(minlength=E + 1) for part in key.split(window)])
    assert torch.equal(starts.long(), counts.cumsum(1) - counts)
