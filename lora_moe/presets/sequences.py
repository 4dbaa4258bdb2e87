"""Presets that route several tokens together: conditional MixLoRA, Omni-SMoLA."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import LoraMoeConfig
from ..middles import ModalSlotMiddle, SlotMiddle, UnpairedMiddle
from ..routers import FactorRouter, SequenceRouter
from .experts import NO_LOSS


def conditional_mixlora(
    num_experts=16, top_k=4, alpha=8.0, *, scored=True, target_modules=(), **fields
) -> LoraMoeConfig:
    """y = W0 x + (alpha / K) sum_{j < K} g_j h_j b_{l_j} a_{i_j} x:  K rows of A and K of B per sequence.

        p = softmax(W m)                                                  i = top-K of p
        q = softmax(softmax(V m) + softmax(sum_k softmax(U_k a_{i_k})))   l = top-K of q

    g and h are p and q, each divided by the sum over the picked;  m is the sequence's mean token, without
    padding.  Decoding with a cache reuses the prompt's routing.

    Args:
        num_experts: E, the number of rank-1 factors.
        top_k: K, the rank of their sum.
        scored: False omits g and h, as in the public code, whose routers then get no gradient.
    Source: Shen et al. 2024 (conditional MixLoRA), arXiv 2402.15896, and its code, where weighting the
    factors by g and h is an option.
    """
    sizes = {"num_experts": num_experts, "r": 1, "top_k": top_k, "alpha": alpha / top_k}
    chosen = {
        "router": SequenceRouter("mean", then=FactorRouter(scored)),
        "middle": UnpairedMiddle(),
    }
    named = {"target_modules": target_modules}
    return LoraMoeConfig(**sizes, **NO_LOSS | chosen | named | fields)


def smola(
    num_experts=16,
    r=4,
    alpha=4.0,
    *,
    segments=1,
    modalities: Sequence[int] | None = None,
    target_modules=(),
    **fields,
) -> LoraMoeConfig:
    """y_t = W0 x_t + sum_e C_te (alpha / r) B_e A_e z_e,  z_e = sum_t D_te x_t,  t in a segment.

        D = softmax over t of W x,   C = softmax over e of W x

    Not causal: each token depends on all of its segment, except padding.  Decoding with a cache raises.

    Args:
        segments: number of equal segments per sequence.
        modalities: modality of each expert, -1 for all tokens; task_ids give each token's.
    Source: Wu et al. 2023 (Omni-SMoLA), arXiv 2312.00968; one slot per expert and the definition of a segment
    are inferred from the abstract.
    """
    middle = SlotMiddle(segments)
    if modalities is not None:
        count = max([0, *modalities]) + 1
        middle = ModalSlotMiddle(segments, count, tuple(modalities))
    sizes = {"num_experts": num_experts, "r": r, "top_k": num_experts, "alpha": alpha}
    named = {"middle": middle, "target_modules": target_modules}
    return LoraMoeConfig(**sizes, **NO_LOSS | named | fields)
