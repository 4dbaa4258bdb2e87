"""The configuration of BranchLoRA's layer."""

from __future__ import annotations

from ...config import LoraMoeConfig


def branch_lora(num_branches=8, r=16, top_k=2, alpha=256.0, **fields) -> LoraMoeConfig:
    """The paper's layer: one A of rank r, E branches of rank r, s = alpha / (E r).

    alpha is relative to the total rank E r, as in moelora: with the paper's 256 and 128 both methods scale
    by 2.  Adding branches later does not change the scaling.
    """
    losses = {"balance_coef": 0.0, "z_coef": 0.0}
    sizes = {"num_experts": num_branches, "r": r, "top_k": top_k, "alpha": alpha / num_branches}
    return LoraMoeConfig(**sizes, shared_a=True, **losses | fields)
