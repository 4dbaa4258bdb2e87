"""Presets whose experts are FFNs: MixLoRA, LLaVA-MoLE.

Letters: E experts, r one expert's rank, K picked experts per token; FFN_e has (alpha / r) B_e A_e added to
each adapted linear layer.
"""

from __future__ import annotations

from typing import Any

from ..config import FFN, LoraMoeConfig
from .experts import NO_LOSS


def mixlora(
    num_experts=8,
    r=16,
    alpha=32.0,
    *,
    top_k=2,
    top_p=None,
    switch=False,
    target_modules=(),
    **fields,
) -> LoraMoeConfig:
    """y = sum over e in top-K of  g_e FFN_e(x),   g = softmax(W x) renormalized.

    One router decides for all linear layers of an FFN, and the experts are mixed after its nonlinearity.
    Linear layers in target_modules outside of FFNs, as in attention, get a plain LoRA of rank r.  There is no
    capacity limit, so no token is dropped.

    Args:
        top_p: MixLoRA's dynamic router: a token uses experts, best first, until their gates sum to top_p;
            top_k is ignored, and gates are not renormalized.
        switch: MixLoRA's switch router: K = 1, g_e is the gate, and z_coef is 0.001.
        target_modules: linear layers, such as gate_proj, up_proj, down_proj and q_proj.
    Raises:
        ValueError: if top_p and switch are both given, or a field is invalid.
    Source: Li et al. 2024 (MixLoRA), arXiv 2404.15159, and its code, where a balanced loss is K: our
    balance_coef is K times its 0.01.  The dynamic and switch routers are MoE-PEFT's; the balance loss of its
        dynamic router is ours times the mean number of experts per token.
    """
    if top_p is not None and switch:
        raise ValueError(f"top_p: expected None with switch=True, got {top_p!r:.99}")
    named = {"alpha": alpha, "target_modules": target_modules, "placement": FFN, "z_coef": 0.0}
    if switch:
        top_k, named["z_coef"] = 1, 0.001
    elif top_p is not None:
        top_k, named["top_p"] = num_experts, top_p
    named |= {"renormalize": top_p is None and not switch, "balance_coef": 0.01 * top_k}
    return LoraMoeConfig(num_experts=num_experts, r=r, top_k=top_k, **named | fields)


def llava_mole(num_experts=3, r=32, alpha=64.0, *, target_modules=(), **fields) -> LoraMoeConfig:
    """y = FFN_e(x),   e = argmax of W x + c:   each token uses one expert, with weight 1.

    The weight is constant, so the task loss does not train the router.  Only the balance loss does; add
    the source's, which is straight-through:

        losses.router_loss(model, losses.straight_through_balance)

    Source: Chen et al. 2024 (LLaVA-MoLE), arXiv 2401.16160, and its code; r and alpha are inferred.
    """
    router: dict[str, Any] = {"top_k": 1, "renormalize": True, "router_bias": True}
    named = {"alpha": alpha, "target_modules": target_modules, "placement": FFN}
    return LoraMoeConfig(num_experts=num_experts, r=r, **router, **NO_LOSS | named | fields)
