"""A trained adapter of a small model, and files made from it."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from lora_moe import (
    LoraMoeConfig,
    inject,
    injected,
)

FILE = "lora_moe.safetensors"
CONFIG = LoraMoeConfig(
    num_experts=4, r=[1, 2, 3, 2], alpha=5, selection_bias=True, target_modules=("q", "v")
)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.v = nn.Linear(width, 8), nn.Linear(8, width)

    def forward(self, x):
        return self.v(torch.relu(self.q(x)))


class Model(nn.Module):
    def __init__(self, width=6, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.to(dtype)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def trained(config=CONFIG, seed=1, **fields):
    """A model whose adapters, routers and biases hold arbitrary values."""
    model = inject(Model(**fields), config)
    g = torch.Generator().manual_seed(seed)
    for layer in injected(model).values():
        for tensor in layer.adapter_state().values():
            tensor.detach().copy_(torch.randn(tensor.shape, generator=g))
    return model


def assert_unchanged(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def rewrite(directory, change=None, metadata=None):
    """Rewrites the saved file with changed tensors and a new description."""
    path = Path(directory) / FILE
    with safetensors.safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        old = file.metadata()
    if change:
        tensors = change(tensors) or tensors
    safetensors.torch.save_file(tensors, path, old if metadata is None else metadata)
