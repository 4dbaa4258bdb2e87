"""A layer of BranchLoRA, its formula, and a step of training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_moe.methods import branch_lora as bl
from lora_moe.methods.branch_lora.adapters import ROUTE_BY

D_IN, D_OUT, E, R, K = 24, 20, 5, 3, 2
B, L = 4, 6
# a left-padded row, a right-padded one, a full one, one with a gap
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1] * 6, [0, 1, 0, 1, 1, 0]])
ids = {"argnames": "route_by", "argvalues": ROUTE_BY}
every_reading = pytest.mark.parametrize(**ids)


class Host(nn.Module):
    """A model of one linear that takes the arguments of Hugging Face models."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(D_IN, D_OUT, dtype=dtype)

    def forward(self, x, attention_mask=None, labels=None, past_key_values=None):
        return self.linear(x)


def host(route_by="first", *, tasks=1, seed=0, dtype=torch.float64, **fields):
    """A Host whose task has begun, with branches of order one and routers with varied decisions."""
    torch.manual_seed(seed)
    model = Host(dtype)
    sizes = {"num_branches": E, "r": R, "top_k": K, "alpha": 7.5, "target_modules": ("linear",)}
    bl.inject(model, bl.branch_lora(**sizes | fields), route_by=route_by)
    for task in range(tasks):
        bl.begin_task(model)
        randomise(model)
        if task + 1 < tasks:
            bl.end_task(model, 0)
    return model


def randomise(model):
    for layer in bl.branch_layers(model).values():
        for branch in bl.branches_of(layer):
            nn.init.normal_(branch)
        nn.init.normal_(bl.routers_of(layer)[-1], std=0.5)


def tokens(dtype=torch.float64, seed=1):
    return torch.randn(B, L, D_IN, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step(model, optimizer, seed):
    x = tokens(next(model.parameters()).dtype, seed)
    model(x, attention_mask=MASK).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def learn(model, steps=3, seed=0):
    """Trains a task with momentum and weight decay, which would change frozen rows most; the optimizer."""
    trained = list(model.parameters())
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9, weight_decay=0.1)
    for i in range(steps):
        step(model, optimizer, 10 * seed + i)
    return optimizer
