"""Presets that route per token: MoELoRA, HydraLoRA, LoRAMoE, MoLA, AdaMoLE, SMoRA.

Letters: E experts, r one expert's rank, K picked experts per token; s is an expert's scale.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..config import LoraMoeConfig
from ..routers import ThresholdRouter

NO_LOSS: dict[str, Any] = {"balance_coef": 0.0, "z_coef": 0.0}


def moelora(num_experts=8, r=128, alpha=256.0, *, target_modules=(), **fields) -> LoraMoeConfig:
    """y = W0 x + sum_e softmax(W x)_e (alpha / r) B_e A_e x,  E experts of rank r / E.

    Every token uses all experts.

    Args:
        num_experts: E.
        r: total rank of all experts, a multiple of E.
        alpha: relative to r, so that s = alpha / r.
    Raises:
        ValueError: if r is not a multiple of E, or a field is invalid.
    Source: Chen et al. 2024 (CoIN), arXiv 2403.08350, and its code.
    """
    piece = share("r", r, num_experts)
    sizes = {"num_experts": num_experts, "r": piece, "top_k": num_experts}
    named = {"alpha": alpha / num_experts, "target_modules": target_modules}
    return LoraMoeConfig(**sizes, **NO_LOSS | named | fields)


def hydralora(num_experts=3, r=8, alpha=16.0, *, target_modules=(), **fields) -> LoraMoeConfig:
    """y = W0 x + sum_e softmax(W x)_e (alpha / r) B_e A x:   one A and E heads B_e.

    Source: Tian et al. 2024 (HydraLoRA), arXiv 2404.19245, and its code.
    """
    sizes = {"num_experts": num_experts, "r": r, "top_k": num_experts, "shared_a": True}
    return LoraMoeConfig(**sizes, **NO_LOSS | _named(alpha, target_modules) | fields)


def loramoe(num_experts=8, r=4, alpha=32.0, *, target_modules=(), **fields) -> LoraMoeConfig:
    """y = W0 x + sum_e softmax(W x)_e (alpha / r) B_e A_e x, and a loss on expert types.

    Add the loss explicitly, since it needs the types of experts and samples:

        losses.router_loss(model, losses.localized_cv_squared, expert_types, sample_types, delta)

    Source: Dou et al. 2024 (LoRAMoE), arXiv 2312.09979, and its code; the paper adapts FFNs.
    """
    sizes = {"num_experts": num_experts, "r": r, "top_k": num_experts}
    return LoraMoeConfig(**sizes, **NO_LOSS | _named(alpha, target_modules) | fields)


def mola(
    num_experts: int | Sequence[int] = (2, 4, 6, 8),
    r: int | Sequence[int] = 8,
    top_k=2,
    alpha=16.0,
    *,
    target_modules=(),
    layers="layers",
    **fields,
) -> tuple[LoraMoeConfig, ...]:
    """y = W0 x + sum over e in top-K of  g_e (alpha / r) B_e A_e x,  g = softmax(W x) renormalized.

    The list gives the number of experts per transformer layer; layers beyond the list have none.

    Args:
        num_experts: E per layer, in order, or one int for all layers.
        r: rank of the experts, per layer or for all.
        top_k: K; a layer with fewer experts uses all of them.
        target_modules: as in LoraMoeConfig; with a list per layer, names instead of a regular expression.
        layers: name of the module list of the layers.
    Returns:
        One configuration per layer, or a single one if E and r are ints.
    Raises:
        ValueError: if lists have different lengths, or a field is invalid.
    Source: Gao et al. 2024 (MoLA), arXiv 2402.08562; the balance loss's coefficient is LoraMoeConfig's.
    """
    lengths = {len(v) for v in (num_experts, r) if not isinstance(v, int)}
    if len(lengths) > 1 or lengths == {0}:
        raise ValueError(f"num_experts, r: expected lists of equal length, got {sorted(lengths)}")
    named = {"z_coef": 0.0, "alpha": alpha}
    if not lengths:
        sizes = {"num_experts": num_experts, "r": r, "top_k": min(top_k, num_experts)}
        return (LoraMoeConfig(**sizes, **named | {"target_modules": target_modules} | fields),)
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError(
            f"target_modules: expected names with a list per layer, got {target_modules!r:.99}"
        )
    names = "|".join(map(re.escape, target_modules))
    n = lengths.pop()
    E, ranks = ((v,) * n if isinstance(v, int) else tuple(v) for v in (num_experts, r))
    made = []
    for i in range(n):
        where = rf"(.*\.)?{re.escape(layers)}\.{i}\.(.*\.)?({names})"
        sizes = {"num_experts": E[i], "r": ranks[i], "top_k": min(top_k, E[i])}
        made.append(LoraMoeConfig(**sizes, **named | {"target_modules": where} | fields))
    return tuple(made)


def adamole(
    num_experts=8, r=4, alpha=8.0, *, max_threshold=None, target_modules=(), **fields
) -> LoraMoeConfig:
    """y = W0 x + sum_e g_e (alpha / r) B_e A_e x,   g = relu(p - tau) / their sum.

    p = softmax(W x) and tau = max_threshold * sigmoid(v x + c): each token uses all experts above its
    threshold.

    Args:
        max_threshold: in (0, 1]; None is 1 / E, with which every token uses at least one.
    Source: Liu and Luo 2024 (AdaMoLE), arXiv 2405.00361, and its code.
    """
    sizes = {"num_experts": num_experts, "r": r, "top_k": num_experts}
    named = {"z_coef": 0.0, "router": ThresholdRouter(max_threshold)}
    return LoraMoeConfig(**sizes, **named | _named(alpha, target_modules) | fields)


def smora(num_experts=64, top_k=8, alpha=64.0, *, target_modules=(), **fields) -> LoraMoeConfig:
    """y = W0 x + (alpha / E) sum over e in top-K of K g_e b_e a_e x,  g = sigmoid(W x) renormalized.

    Every rank of one LoRA is an expert.  The top-K uses sigmoid(W x) + bias; after each step, call
    losses.update_selection_bias(model), which balances through the bias, without a loss.

    Args:
        num_experts: E, the rank of the LoRA.
    Source: Zhao et al. 2025 (SMoRA), arXiv 2501.15103; that s is alpha / E is inferred.
    """
    sizes: dict[str, Any] = {"num_experts": num_experts, "r": 1, "top_k": top_k}
    router: dict[str, Any] = {"gate": "sigmoid", "renormalize": True, "selection_bias": True}
    named = _named(alpha * top_k / num_experts, target_modules)
    return LoraMoeConfig(**sizes, **router, **NO_LOSS | named | fields)


def share(name: str, total, pieces: int) -> int:
    """total / pieces; raises ValueError unless it is an integer of at least 1."""
    if not isinstance(total, int) or not isinstance(pieces, int) or pieces < 1 or total % pieces:
        raise ValueError(f"{name}: expected a multiple of {pieces} experts, got {total!r:.99}")
    return total // pieces


def _named(alpha, target_modules):
    return {"alpha": alpha, "target_modules": target_modules}
