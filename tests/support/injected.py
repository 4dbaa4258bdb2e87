"""A model of a few linears, and a configuration for it."""

from __future__ import annotations

from torch import nn

from lora_moe import LoraMoeConfig


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.q_proj(x) * self.v_proj(x))


class Model(nn.Module):
    """Two blocks, a vision part with the same names, a tied head, one linear under two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.vision = nn.Sequential(Attention())
        self.shared = nn.Linear(8, 8)
        self.alias = self.shared
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.alias(self.shared(self.vision(x))))


def config(*targets, **fields):
    targets = targets[0] if len(targets) == 1 and targets[0].startswith("^") else targets
    return LoraMoeConfig(num_experts=4, r=2, target_modules=targets, **fields)
