"""A model with experts for tests of `grow`, and its state, outputs and experts."""

from __future__ import annotations

import torch
from torch import nn

from lora_moe import (
    LoraMoeConfig,
    inject,
    injected,
    use_routing,
)

D, E = 8, 3
X = torch.randn(6, 5, D, generator=torch.Generator().manual_seed(0))
BANKS = {
    "equal": {"r": 2},
    "unequal": {"r": (1, 3, 2), "alpha": (4.0, 8.0, 2.0)},
    "shared": {"r": 2, "shared_a": True},
    "dense": {"r": 2, "top_k": 3, "renormalize": False},
    "bias": {"r": 2, "router_bias": True, "selection_bias": True, "temperature": 2.0},
    "sigmoid": {"r": 2, "gate": "sigmoid", "top_k": 1},
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def with_experts(bank="equal", **fields):
    names = {"num_experts": E, "target_modules": ("up", "down")}
    model = inject(Model(), LoraMoeConfig(**names | BANKS[bank] | fields))
    with torch.no_grad():
        for layer in injected(model).values():
            for name, tensor in layer.adapter_state().items():
                nn.init.normal_(tensor, std=0.5 if name == "lora_A" else 1.0)
    return model


def state(model):
    return {
        (path, name): tensor.detach().clone()
        for path, layer in injected(model).items()
        for name, tensor in layer.adapter_state().items()
    }


@torch.no_grad()
def run(model, **routing):
    if not routing:
        return model(X)
    with use_routing(model, **routing):
        return model(X)


def by_expert(model, e):
    return run(model, task_ids=torch.full((len(X),), e))


def close(got, expected, bound=1e-6):
    """Asserts a difference of at most `bound` times the largest output, which is about 30."""
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= bound, float(error)
