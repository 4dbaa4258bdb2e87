"""Layers of every kind, and their formula in literal loops over tokens and experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, LoraMoeLinear

D_IN, D_OUT = 24, 20
PARAMETERS = ("lora_A", "lora_B", "router_weight")
CONFIGS = {
    "defaults": LoraMoeConfig(num_experts=4, r=3, alpha=4),
    "sigmoid": LoraMoeConfig(num_experts=4, r=3, alpha=4, gate="sigmoid", renormalize=False),
    "unequal-ranks": LoraMoeConfig(num_experts=3, r=[1, 6, 2], alpha=5),
    "shared-a": LoraMoeConfig(num_experts=4, r=3, alpha=4, shared_a=True),
    "dense": LoraMoeConfig(num_experts=3, r=2, top_k=3, alpha=3),
    "selection-bias": LoraMoeConfig(num_experts=4, r=3, alpha=4, selection_bias=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make(config=CONFIGS["defaults"], base=None, seed=0):
    """A layer with a B of order one and routers with varied decisions."""
    torch.manual_seed(seed)
    layer = LoraMoeLinear(base or nn.Linear(D_IN, D_OUT), config)
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.router_weight, std=0.5)
    if layer.selection_bias is not None:
        layer.selection_bias.copy_(torch.rand(config.num_experts))
    return layer


def tokens(*shape, seed=1):
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(seed))


def gates_by_loop(config, w, bias, x):
    """[[(expert, weight), ...] for each token], in fp64."""
    picked = []
    for row in x:
        logits = torch.stack([row @ w[e] for e in range(config.num_experts)])
        p = torch.softmax(logits, 0) if config.gate == "softmax" else torch.sigmoid(logits)
        score = p if bias is None else p + bias
        order = sorted(range(config.num_experts), key=lambda e: (-score[e].item(), e))
        ids = order[: config.top_k]
        total = sum(p[e] for e in ids) if config.normalizes else 1
        picked.append([(e, p[e] / total) for e in ids])
    return picked


def experts_by_loop(config, a, b, x, picked):
    """sum over picked e of  g_te (alpha / r_e) B_e A_e x_t, in fp64.  (T, D_in) -> (T, D_out)"""
    rows, start = [], 0
    for r in config.ranks:
        rows.append(range(start, start + r))
        start += r
    out = []
    for row, choice in zip(x, picked, strict=True):
        y = torch.zeros(b.shape[1], dtype=torch.float64)
        for e, g in choice:
            for j, i in enumerate(rows[e]):
                s = row @ a[j if config.shared_a else i]
                y = y + g * config.alpha / config.ranks[e] * s * b[i]
        out.append(y)
    return torch.stack(out)


def in_double(layer):
    adapter = [layer.get_parameter(name).detach().double().requires_grad_() for name in PARAMETERS]
    bias = layer.selection_bias
    return *adapter, None if bias is None else bias.double()


def by_loop(layer, x, mask=1.0):
    """The layer's output and its gradients for a sum over y, by loops and autograd in fp64."""
    a, b, w, bias = in_double(layer)
    x = x.detach().double().flatten(0, -2).requires_grad_()
    picked = gates_by_loop(layer.config, w, bias, x)
    y = nn.functional.linear(x, layer.weight.double(), layer.bias.double())
    y = y + experts_by_loop(layer.config, a, b, x * mask, picked)
    return y, dict(zip(("x", *PARAMETERS), (x, a, b, w), strict=True))
