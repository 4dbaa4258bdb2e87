"""A layer of C-LoRAE and samples for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_moe
from lora_moe.methods import c_lorae
from lora_moe.methods.c_lorae import CLoraeConfig, CollaborativeLinear

fp64 = pytest.mark.skipif(
    lora_moe.backend.serving("cpu") == "triton", reason="Triton does not support fp64"
)
D_IN, D_OUT = 20, 14
TASKS = torch.tensor([2, 0, -1, 1, 0])  # of five samples; the third has none
CONFIGS = {
    "softmax": CLoraeConfig(num_tasks=3, r=7, alpha=5),
    "sigmoid": CLoraeConfig(num_tasks=3, r=7, alpha=5, gate="sigmoid"),
    "one-scale": CLoraeConfig(num_tasks=3, r=7, alpha=5, task_alpha=5 * 2 / 7),
    "plain-sum": CLoraeConfig(num_tasks=3, r=7, alpha=5, gate="sum"),
    "universal-only": CLoraeConfig(num_tasks=0, r=7, alpha=5),
    "one-lora": CLoraeConfig(num_tasks=3, r=7, alpha=5).one_lora(),
}


def make(config=CONFIGS["softmax"], dtype=torch.float64, seed=0):
    """A layer with a B of order one and a gate that is never close to undecided."""
    torch.manual_seed(seed)
    layer = CollaborativeLinear(nn.Linear(D_IN, D_OUT, dtype=dtype), config)
    nn.init.normal_(layer.lora_B, std=0.5)
    if layer.router_weight is not None:
        nn.init.normal_(layer.router_weight, std=0.5)
    c_lorae.set_tasks(layer, TASKS)
    return layer


def samples(dtype=torch.float64, length=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(len(TASKS), length, D_IN, generator=g, dtype=torch.float64).to(dtype)
