"""Presets that route by task ids (use_routing): MTL-LoRA, Poly, MoRE, MLoRE, C-LoRAE, BranchLoRA."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..components import first_of
from ..config import LoraMoeConfig
from ..middles import CoreMiddle, MixedMiddle
from ..recompute import recomputing
from ..routers import (
    GenericRouter,
    PerTaskRouter,
    PolyRouter,
    PrefixRouter,
    SequenceRouter,
    TaskRouter,
)
from ..routers import UniversalRouter as Universal
from ..steering import layers_of
from .experts import NO_LOSS, share


def mtl_lora(
    num_tasks: int, num_experts=3, r=8, alpha=16.0, *, temperature=0.1, target_modules=(), **fields
) -> LoraMoeConfig:
    """y = W0 x + (alpha / r) sum_e softmax(w_t / temperature)_e B_e C_t A x  for task t.

    One A, E heads B and, per task, a core matrix C_t (r, r), initially the identity, and weights w_t (E,).

    Source: Yang et al. 2024 (MTL-LoRA), arXiv 2410.09437, and its code, whose Lambda is C and whose script
    has this temperature.
    """
    sizes = {"num_experts": num_experts, "r": r, "top_k": num_experts, "shared_a": True}
    chosen = {"router": TaskRouter(num_tasks), "middle": CoreMiddle(num_tasks)}
    named = {"alpha": alpha, "temperature": temperature, "target_modules": target_modules}
    return LoraMoeConfig(**sizes, **NO_LOSS | chosen | named | fields)


def poly(
    num_tasks: int, num_experts=4, r=8, alpha=1.0, *, target_modules=(), **fields
) -> LoraMoeConfig:
    """y = W0 x + (alpha / r) (sum_e g_e B_e) (sum_e g_e A_e) x,   g_e = p_e / sum of p,   p = sigmoid(G_t).

    Task t mixes E skills, each a LoRA, into one LoRA; in training, p is sampled from the relaxed
    Bernoulli distribution with logits G_t.  This is PEFT's Poly with scale 1 / r and n_splits=1; more
    splits (multi-head routing, MHR) are not supported.

    Args:
        num_experts: E, the number of skills.
    Source: Ponti et al. 2023 (Polytropon), arXiv 2202.13914, and PEFT's Poly.
    """
    sizes = {"num_experts": num_experts, "r": r, "top_k": num_experts, "alpha": alpha}
    chosen = {"router": PolyRouter(num_tasks), "middle": MixedMiddle()}
    named = {"target_modules": target_modules}
    return LoraMoeConfig(**sizes, **NO_LOSS | chosen | named | fields)


def more(
    num_tasks: int, num_experts=8, r=8, alpha=16.0, *, target_modules=(), **fields
) -> LoraMoeConfig:
    """y = W0 x + (alpha / r) (1 + p_e - stop(p_e)) B[:, :n] A[:n] x,   n = (e + 1) r / E.

    p = softmax(W z_t + c) and e = argmax p:  task t picks one of E ranks of a LoRA through its
    embedding z_t.

    presets.contrastive_loss is the paper's contrastive loss on the embeddings.

    Args:
        num_experts: E, the number of ranks to pick from.
        r: the largest rank, a multiple of E.
    Source: Zhang et al. 2025 (MoRE), arXiv 2505.22694, and its code.
    """
    sizes = {"num_experts": num_experts, "r": share("r", r, num_experts), "top_k": num_experts}
    named = {
        "alpha": alpha / num_experts,
        "router": PrefixRouter(num_tasks),
        "target_modules": target_modules,
    }
    return LoraMoeConfig(**sizes, **NO_LOSS | named | fields)


@contextlib.contextmanager
def contrastive_loss(
    model: nn.Module,
    task_ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    temperature: float = 0.05,
):
    """MoRE's loss on the task embeddings, for forwards inside the block:

        with presets.contrastive_loss(model, task_ids, mask) as contrast:
            loss = model(...).loss
        (loss + contrast()).backward()

    It is the mean over layers and samples of -log softmax_t(cos(x_b, z_t) / temperature) at the sample's
    task, with x_b the first non-padding token of the layer's input.

    Args:
        task_ids: (B,), one task per sample.
        mask: (B, L), zero for padding; None if there is none.
    Raises:
        ValueError: if no layer uses `more`.
    Source: Zhang et al. 2025 (MoRE), arXiv 2505.22694, and its code.
    """
    layers = [y for y in layers_of(model).values() if isinstance(y.config.router, PrefixRouter)]
    if not layers:
        raise ValueError("model: expected layers of presets.more, got none")
    found = []

    def note(layer, args):
        if recomputing():
            return
        x, z = args[0], layer.task_embedding  # (B, L, D_in), (N, D_in)
        at = 0 if mask is None else first_of(mask).to(x.device)
        first = x[torch.arange(x.shape[0], device=x.device), at]  # (B, D_in)
        cosine = nn.functional.cosine_similarity(first.to(z.dtype)[:, None], z, dim=-1)
        labels = task_ids.to(z.device).long()
        found.append(nn.functional.cross_entropy(cosine / temperature, labels))

    def mean():
        if not found:
            raise RuntimeError("contrastive_loss: expected a forward inside the block, got none")
        return torch.stack([loss.to(found[0].device) for loss in found]).mean()

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield mean
    finally:
        for handle in handles:
            handle.remove()


def mlore(
    num_tasks: int,
    r: Sequence[int] = (16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128),
    top_k=9,
    alpha=16.0,
    *,
    generic_r=64,
    task_r=64,
    noise=True,
    target_modules=(),
    **fields,
) -> LoraMoeConfig:
    """y = W0 x + s B_0 A_0 x + s B_t A_t x + sum over e in top-K of  p_e s_e B_e A_e x.

    p = softmax(W_t m), with m the sequence's mean token.  Expert 0 is generic, expert 1 + t belongs to
    task t, and M shared experts follow.  In training, the router's logits have learned noise.  The
    balance loss is losses.router_loss(model, losses.cv_squared).  Decoding with a cache reuses the
    prompt's routing.  This covers the router and the experts, not the vision decoder.

    Args:
        r: ranks of the shared experts, (M,).
        top_k: K.
        alpha: s = alpha / r; a number, or one per expert (1 + num_tasks + M,).
        generic_r, task_r: ranks of the generic and of the task experts.
    Source: Yang et al. 2024 (MLoRE), arXiv 2403.17749, with 15 ranks from 16 to 128; their steps, the
    ranks of the other experts and the scale are inferred.
    """
    ranks = (generic_r, *[task_r] * num_tasks, *r)
    sizes = {"num_experts": len(ranks), "r": ranks, "top_k": top_k, "alpha": alpha}
    router = SequenceRouter("mean", then=GenericRouter(num_tasks, noise))
    named = {"router": router, "target_modules": target_modules}
    return LoraMoeConfig(**sizes, **NO_LOSS | named | fields)


def c_lorae(
    num_tasks: int,
    r=24,
    alpha=24.0,
    *,
    task_alpha=None,
    gate="softmax",
    target_modules=(),
    **fields,
) -> LoraMoeConfig:
    """y = W0 x + g1(x) s_U B_U A_U x + g2(x) s_t B_t A_t x,   [g1, g2] = softmax(W x)  for task t.

    Expert 0, U, is shared by all tasks and has rank r; expert 1 + t belongs to task t and has rank r / N.
    Scales are alpha / rank (inferred).  The achievement loss is methods.c_lorae.AchievementLoss.

    Args:
        num_tasks: N, at most r.
        task_alpha: alpha of the task experts; None is alpha.
        gate: "softmax", "sigmoid" or "sum" (both weights 1).
    Source: C-LoRAE (IJCAI 2025), arXiv 2505.06303; the two logits of x are inferred.
    """
    if not isinstance(r, int) or not isinstance(num_tasks, int) or not 1 <= num_tasks <= r:
        raise ValueError(f"num_tasks: expected an integer in [1, r = {r}], got {num_tasks!r:.99}")
    task_alpha = alpha if task_alpha is None else task_alpha
    sizes: dict[str, Any] = {
        "num_experts": 1 + num_tasks,
        "r": (r, *[r // num_tasks] * num_tasks),
        "alpha": (alpha, *[task_alpha] * num_tasks),
        "top_k": 2,
    }
    named = {"router": Universal(num_tasks, gate), "target_modules": target_modules}
    return LoraMoeConfig(**sizes, **NO_LOSS | named | fields)


def branch_lora(
    num_tasks: int,
    num_branches=8,
    r=16,
    top_k=2,
    alpha=256.0,
    *,
    by="first",
    target_modules=(),
    **fields,
) -> LoraMoeConfig:
    """y = W0 x + (alpha / (E r)) sum over j in top-K of  g_j B_j A x,  g = softmax(W_t x*) renormalized.

    One trunk A, E branches B_j, and one router W_t per task t; x* is the first token of the sequence (or
    the mean of its tokens).  All tasks train together; for sequential tasks with freezing branches, use
    methods.branch_lora.  Decoding with a cache reuses the prompt's routing.

    Args:
        num_branches: E.
        alpha: relative to the total rank E r.
        by: "first" or "mean"; in a causal model the first token has no context, so the mean is better.
    Source: Zhang et al. 2025 (BranchLoRA), arXiv 2506.02041.
    """
    sizes = {"num_experts": num_branches, "r": r, "top_k": top_k, "shared_a": True}
    named = {
        "alpha": alpha / num_branches,
        "router": SequenceRouter(by, then=PerTaskRouter(num_tasks)),
        "target_modules": target_modules,
    }
    return LoraMoeConfig(**sizes, **NO_LOSS | named | fields)
