"""The public functions on tensors; they validate every argument, and nothing below them does.

    y_t = base_t + sum over e in topk(router(x_t)) of  g_te * s_e * B_e A_e x_t

Letters: T tokens (all leading dimensions of x together), E experts, K picked experts per token,
R rank rows of all experts together, r one expert's rank, D_in and D_out the linear's sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from . import autograd, checks, fast_path, operands, plan
from .banks import routed_lora_banks
from .reference import accumulator
from .routing import Routing

__all__ = ["expand", "grouped_lora", "routed_lora", "routed_lora_banks", "router_topk", "shrink"]

_ops = torch.ops.lora_moe


def router_topk(
    x: torch.Tensor,
    router_weight: torch.Tensor,
    top_k: int,
    *,
    gate: str = "softmax",
    renormalize: bool = True,
    bias: torch.Tensor | None = None,
    top_p: float | None = None,
    threshold: float | None = None,
    router_bias: torch.Tensor | None = None,
) -> Routing:
    """Pick top_k experts per token:  ids = top-k of p + bias,  weights = p[ids];  p = gate(x W^T + c).

    Args:
        x: (..., D_in), fp32, fp64, bf16 or fp16.
        router_weight: (E, D_in), in x's dtype or wider; computed in full fp32 (fp64).
        top_k: K in [1, E]; K = E gives the dense mixture.
        gate: "softmax" over all E, or "sigmoid" of each logit.
        renormalize: divide the K weights by their sum; with softmax this equals a softmax over the
            picked logits.
        bias: (E,), added to p for the selection only, not to the weights; gets no gradient
            (DeepSeek-V3's loss-free balancing, arXiv 2408.15664).
        top_p: in (0, 1]: a token keeps its picked experts, best first, until their gates sum to top_p;
            the remaining slots are empty.  Softmax only (MixLoRA's top-p router).
        threshold: in [0, 1]: picked experts with a smaller gate are dropped, possibly all of them.
        router_bias: c (E,), floating, added to the logits; differentiable, its gradient in its own dtype.
    Returns:
        Routing with all fields set; its logits include router_bias.  T is the product of x's leading
        dimensions.  Ties go to the lower expert id; NaN logits are picked last, and ids are always valid.
    Raises:
        ValueError, TypeError: if an argument is invalid; the message names the argument, what was
            expected and what was passed.
    """
    x = checks.floating_input(x, "router_topk")
    checks.router(x, router_weight, top_k, gate, bias, router_bias)
    rows, selection = operands.rows_of(x), checks.selection(bias, x)
    options = top_k, gate, bool(renormalize), *checks.sparsity(top_p, threshold, gate)
    if operands.needs_graph(x, router_weight, router_bias):
        out = autograd.RouterTopK.apply(rows, router_weight, selection, router_bias, *options)
    else:
        w, router_bias = operands.router(router_weight, router_bias, x)
        out = _ops.router_topk(rows, w, selection, router_bias, *options)
    return _routing(*out)


def grouped_lora(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    routing: Routing,
    *,
    rank_offsets: Sequence[int] | int,
    scaling: float | Sequence[float] | torch.Tensor = 1.0,
    shared_a: bool = False,
    base: torch.Tensor | None = None,
    frozen: Sequence[int] = (),
    slots: str | None = None,
    base_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Experts with a given routing:  y_t = base_t + sum over slots j of  w_tj s_e B_e A_e x_t,  e = ids_tj.

    Between linear layers that share a routing decision, such as the projections of an FFN, a token has
    one row per slot:

        slots="apart":  y_tj = base_t + w_tj s_e B_e A_e x_t        (or base_tj)
        slots="sum":    y_t  = base_t + sum over slots j of  w_tj s_e B_e A_e x_tj

    Args:
        x: (..., D_in), fp32, fp64, bf16 or fp16; (..., K, D_in) with slots="sum".
        lora_A: (R, D_in), the concatenated rows of all experts; (r, D_in) with shared_a.
        lora_B: (R, D_out); row i pairs with row i of lora_A.
        routing: for the T tokens of x, from Routing.from_ids, Routing.from_gates or router_topk.
        rank_offsets: E + 1 ascending integers, where expert e owns rows [o_e, o_e+1); or an int r if
            every expert has rank r.
        scaling: s as one float, or per expert as a sequence or an (E,) tensor.  Gets no gradient.
        shared_a: all experts share one A (HydraLoRA, BranchLoRA); all ranks must be r.
        base: (..., D_out) in x's dtype, added to the result; never modified in place.  With slots="apart"
            also (..., K, D_out); with one row per token, it is read K times without a copy.
        frozen: expert ids whose rows of lora_B (and lora_A) get a gradient of exactly zero.
        slots: None, "apart" or "sum"; see above.
        base_weight: (D_out, D_in) in x's dtype, frozen.  Pass it if `base` was computed from x with this
            weight and without a graph: the gradient of x then includes dy @ base_weight, without the
            separate addition of autograd.  Not supported with slots.
    Returns:
        y (..., D_out) in x's dtype; (..., K, D_out) with slots="apart".  The output of a token without
        experts, and of an empty slot with slots="apart", equals base bit for bit (0 without base).
    Raises:
        ValueError, TypeError: if an argument is invalid.
        ValueError: if an expert id is outside [-1, E) on a CPU; a GPU masks it.
    """
    x = checks.floating_input(x, "grouped_lora")
    if not isinstance(routing, Routing):
        raise TypeError(f"routing: expected a lora_moe.Routing, got {type(routing).__name__}")
    E = routing.num_experts
    offsets, frozen, scales = checks.experts(
        x, lora_A, lora_B, E, rank_offsets, shared_a, frozen, scaling
    )
    leading = checks.slot_rows(x, slots, routing.indices.shape)
    rows = operands.rows_of(x)
    top_k = checks.slots(routing, x, prod(leading))
    if slots is None:
        chosen = operands.plan_for(rows, lora_B, offsets, top_k, shared_a)
        base = operands.base(base, x, leading, lora_B.shape[1])
    else:
        chosen = plan.SEGMENTED
        if shared_a:  # not implemented with slots: give each expert a copy
            lora_A, shared_a = lora_A.repeat(E, 1), False
        apart = slots == "apart" and base is not None and base.dim() == len(leading) + 2
        base = operands.base(base, x, (*leading, top_k) if apart else leading, lora_B.shape[1])
    weights = routing.weights.to(accumulator(x.dtype))
    if base_weight is not None:
        checks.base_weight(base_weight, x, lora_B.shape[1], base, slots)
    decided = routing.indices.contiguous(), weights.contiguous()
    args = base, *decided, scales, offsets, bool(shared_a), slots or "none"
    if operands.needs_graph(x, lora_A, lora_B, base, weights):
        y = autograd.GroupedLora.apply(rows, lora_A, lora_B, *args, frozen, chosen, base_weight)
    else:
        adapter = map(operands.rows_contiguous, (lora_A, lora_B))
        y, _ = _ops.grouped_lora(rows, *adapter, *args, chosen)
    if slots == "apart":
        return y.view(*leading, top_k, y.shape[1])
    return y if x.dim() == 2 and slots is None else y.view(*leading, y.shape[1])


def routed_lora(
    x: torch.Tensor,
    router_weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    top_k: int,
    *,
    rank_offsets: Sequence[int] | int,
    scaling: float | Sequence[float] | torch.Tensor = 1.0,
    shared_a: bool = False,
    base: torch.Tensor | None = None,
    gate: str = "softmax",
    renormalize: bool = True,
    bias: torch.Tensor | None = None,
    top_p: float | None = None,
    threshold: float | None = None,
    frozen: Sequence[int] = (),
    router_bias: torch.Tensor | None = None,
    base_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Routing]:
    """Router, top-k and experts in a single pass over x:  grouped_lora(x, ..., router_topk(x, ...)).

        y_t = base_t + sum over e in topk(router(x_t)) of  g_te * s_e * B_e A_e x_t

    Args:
        As in router_topk and grouped_lora.
    Returns:
        y (..., D_out) in x's dtype, and the Routing; both differentiable.
    Raises:
        ValueError, TypeError: if an argument is invalid; the message names the argument, what was
            expected and what was passed.
    """
    if base_weight is None:
        done = fast_path.routed_lora(
            x, router_weight, lora_A, lora_B, top_k, rank_offsets, scaling, shared_a, base, gate,
            renormalize, bias, top_p, threshold, frozen, router_bias,
        )  # fmt: skip
        if done is not None:
            return done
    x = checks.floating_input(x, "routed_lora")
    checks.router(x, router_weight, top_k, gate, bias, router_bias)
    offsets, frozen, scales = checks.experts(
        x, lora_A, lora_B, router_weight.shape[0], rank_offsets, shared_a, frozen, scaling
    )
    rows = operands.rows_of(x)
    chosen = operands.plan_for(rows, lora_B, offsets, top_k, shared_a)
    added = operands.base(base, x, x.shape[:-1], lora_B.shape[1]), checks.selection(bias, x)
    if base_weight is not None:
        checks.base_weight(base_weight, x, lora_B.shape[1], base)
    router = top_k, gate, bool(renormalize), *checks.sparsity(top_p, threshold, gate)
    options = scales, offsets, bool(shared_a), *router
    if operands.needs_graph(x, router_weight, lora_A, lora_B, base, router_bias):
        y, *routing = autograd.RoutedLora.apply(
            rows, router_weight, lora_A, lora_B, *added, router_bias, *options, frozen, chosen, base_weight
        )  # fmt: skip
    else:
        w, router_bias = operands.router(router_weight, router_bias, x)
        adapter = map(operands.rows_contiguous, (lora_A, lora_B))
        y, *routing, _ = _ops.routed_lora(rows, w, *adapter, *added, router_bias, *options, chosen)
    return operands.like(x, y), _routing(*routing)


def shrink(
    x: torch.Tensor, lora_A: torch.Tensor, router_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S = x A^T and, in the same pass over x, logits = x W^T.

    Args:
        x: (..., D_in).
        lora_A: (R, D_in).
        router_weight: (E, D_in) or None.
    Returns:
        S (T, R) and logits (T, E) or None, both in fp32, or fp64 if x is fp64.
    Raises:
        ValueError, TypeError: if an argument is invalid.
    """
    x = checks.floating_input(x, "shrink")
    checks.matrix("lora_A", lora_A, x, (None, x.shape[-1]))
    if router_weight is not None:
        checks.matrix("router_weight", router_weight, x, (None, x.shape[-1]))
    rows = operands.rows_of(x)
    if operands.needs_graph(x, lora_A, router_weight):
        s, logits = autograd.Shrink.apply(rows, lora_A, router_weight)
    else:
        w = operands.router_operand(router_weight, x)
        s, logits = _ops.shrink(rows, *operands.rounded(x, lora_A), w)
    return s, None if router_weight is None else logits


def expand(H: torch.Tensor, lora_B: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
    """y = base + H B, summed in fp32 (fp64) and rounded once.

    Args:
        H: (T, R), floating.
        lora_B: (R, D_out).
        base: (..., D_out) with T rows in all, or None.
    Returns:
        y in base's shape and dtype; without base (T, D_out) in lora_B's dtype.
    Raises:
        ValueError, TypeError: if an argument is invalid.
    """
    H = checks.floating_input(H, "expand", name="H")
    if H.dim() != 2:
        raise ValueError(f"H: expected (T, R), got {tuple(H.shape)}")
    checks.matrix("lora_B", lora_B, H, (H.shape[1], None), "one row per column of H")
    D_out = lora_B.shape[1]
    dtype = lora_B.dtype if base is None else base.dtype
    rows = None
    if base is not None:
        checks.matrix("base", base, H, (*base.shape[:-1], D_out))
        rows = operands.rows_of(base)
        checks.shape_is("base", rows, (H.shape[0], D_out), "one row per row of H")
    H = H.to(accumulator(dtype)).contiguous()
    if operands.needs_graph(H, lora_B, base):
        y = autograd.Expand.apply(H, lora_B, rows, dtype)
    else:
        y = _ops.expand(H, operands.rows_contiguous(lora_B.to(dtype)), None, None, rows, dtype)
    return y if base is None else y.view(base.shape)


def _routing(indices, weights, logits, mean_prob, lse, counts):
    return Routing(indices, weights, counts, logits, mean_prob, lse)
