"""loralib, the code of LoRA's authors: one linear map."""

from __future__ import annotations

import loralib
import torch

from lora_moe import LoraMoeConfig, LoraMoeLinear

from .measure import Pair, Side, fill, mean_square, tokens


def lora() -> Pair:
    torch.manual_seed(0)
    theirs = fill(loralib.Linear(12, 10, r=3, lora_alpha=7, merge_weights=False).double())
    base = torch.nn.Linear(12, 10).double()
    base.load_state_dict({"weight": theirs.weight, "bias": theirs.bias})
    theirs.bias.requires_grad_(False)
    ours = LoraMoeLinear(base, LoraMoeConfig(num_experts=1, top_k=1, r=3, alpha=7))
    with torch.no_grad():
        ours.lora_A.copy_(theirs.lora_A)
        ours.lora_B.copy_(theirs.lora_B.T)
    return Pair(
        Side(mean_square(ours), lambda: {"lora_A": ours.lora_A.grad, "lora_B": ours.lora_B.grad}),
        Side(
            mean_square(theirs),
            lambda: {"lora_A": theirs.lora_A.grad, "lora_B": theirs.lora_B.grad.T},
        ),
        tokens(12),
    )
