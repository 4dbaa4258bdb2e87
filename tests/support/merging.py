"""A model with experts and a fixed mixture of them."""

from __future__ import annotations

import torch
from torch import nn

from lora_moe import LoraMoeConfig, Routing, inject, injected, use_routing

X = torch.randn(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
C = [0.5, 0.0, -1.25]
BANKS = {
    "equal": {"r": 2},
    "unequal": {"r": (1, 3, 2), "alpha": (4.0, 8.0, 2.0)},
    "shared": {"r": 3, "shared_a": True, "use_rslora": True},
}


class Conv1D(nn.Module):
    """transformers' Conv1D: the weight is (D_in, D_out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Model(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 9), Conv1D(5, 9)
        self.head = nn.Linear(5, 4, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))


def with_experts(bank="equal", model=None, **fields):
    fields = BANKS[bank] | {"num_experts": 3, "target_modules": ("up", "down")} | fields
    model = inject(model or Model(), LoraMoeConfig(**fields))
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B)
    return model


def mixture(model, c=C, x=X):
    """The model's output with the experts of every token weighted by c."""
    gates = torch.tensor(c, dtype=torch.float64).expand(len(x), -1)
    with torch.no_grad(), use_routing(model, routing=Routing.from_gates(gates)):
        return model(x)


def close(got, expected, bound=1e-12):
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= bound, float(error)
