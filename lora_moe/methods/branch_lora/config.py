"""Configurations: BranchLoRA's layer, and MoELoRA's, which it is measured against."""

from __future__ import annotations

from ...config import LoraMoeConfig


def branch_lora(num_branches=8, r=16, top_k=2, alpha=256.0, **fields) -> LoraMoeConfig:
    """The paper's layer: one A of rank r, E branches of rank r, s = alpha / (E r).

    alpha belongs to the total rank E r, as it does in moelora: with the paper's 256 and 128 both
    methods scale by 2.  More branches later leave the scaling alone.
    """
    losses = {"balance_coef": 0.0, "z_coef": 0.0}
    sizes = {"num_experts": num_branches, "r": r, "top_k": top_k, "alpha": alpha / num_branches}
    return LoraMoeConfig(**sizes, shared_a=True, **losses | fields)


def moelora(num_experts=8, r=128, alpha=256.0, **fields) -> LoraMoeConfig:
    """MoELoRA, the baseline: every token takes all E experts of rank r / E, softmax gates, s = alpha / r.

    Source: Chen et al. 2024 (CoIN), arXiv 2403.08350.
    """
    if r % num_experts:
        raise ValueError(f"r: expected a multiple of {num_experts} experts, got {r}")
    sizes = {"num_experts": num_experts, "r": r // num_experts, "top_k": num_experts}
    losses = {"balance_coef": 0.0, "z_coef": 0.0}
    return LoraMoeConfig(**sizes, alpha=alpha / num_experts, **losses | fields)
