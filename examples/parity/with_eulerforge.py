"""EulerForge's mixture of LoRAs around one linear map: softmax, top-k, renormalized; a router with a bias."""

from __future__ import annotations

import torch
from eulerforge.modules.mixture_lora import MixtureLoRALinear

from lora_moe import LoraMoeConfig, inject

from .measure import Pair, Side, fill, gradients_of, mean_square, tokens

E, R = 5, 3


def mixture() -> Pair:
    torch.manual_seed(0)
    base = torch.nn.Linear(12, 10).double().requires_grad_(False)
    theirs = fill(
        MixtureLoRALinear(base, E, top_k=2, r=R, alpha=6, dropout=0.0, router_temperature=0.7)
    )
    config = LoraMoeConfig(
        num_experts=E, top_k=2, r=R, alpha=6, router_bias=True, temperature=0.7,
        target_modules=("0",),
    )  # fmt: skip
    ours = inject(torch.nn.Sequential(base), config)

    def arranged(of):
        A, B = ([of(getattr(e, f"lora{n}")) for e in theirs.experts] for n in "AB")
        return {
            "0.lora_A": torch.cat(A),
            "0.lora_B": torch.cat(B, 1).T,
            "0.router_weight": of(theirs.router.weight),
            "0.router_bias": of(theirs.router.bias),
        }

    with torch.no_grad():
        for name, tensor in arranged(lambda p: p).items():
            ours.get_parameter(name).copy_(tensor)
    return Pair(
        Side(mean_square(ours), gradients_of(ours)),
        Side(mean_square(theirs), lambda: arranged(lambda p: p.grad)),
        tokens(12),
        bound=1e-8,
        why="theirs adds 1e-9 to the sum of the gates",
    )
