"""routed_lora_banks: routed_lora of several layers that read the same x, in one call.

Letters as in functional.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import checks, fast_path, operands

_ops = torch.ops.lora_moe


def routed_lora_banks(
    x: torch.Tensor,
    router_weights: Sequence[torch.Tensor],
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    top_k: int,
    base: torch.Tensor,
    *,
    starts: Sequence[int],
    rank_offsets: Sequence[int] | int,
    scaling: Sequence[torch.Tensor],
    shared_a: bool = False,
    gate: str = "softmax",
    renormalize: bool = True,
    biases: Sequence[torch.Tensor | None] | None = None,
    top_p: float | None = None,
    threshold: float | None = None,
    router_biases: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """routed_lora of several layers that read the same x and write adjacent outputs; for inference.

        y[:, starts_i :][:, :D_i] = base + routed_lora of layer i;   all other columns equal base

    For example, for a fused qkv projection.  If the layers' operands are adjacent in memory (lora_Bs along
    their columns), a few tokens on a GPU take two launches, as many as one layer.

    Args:
        x: (..., D_in).
        router_weights: (E, D_in) per layer; all layers have E experts of the same ranks.
        lora_As: (R, D_in) per layer, (r, D_in) with shared_a.
        lora_Bs: (R, D_i) per layer.
        base: (..., D_out) of x's dtype.
        starts: first of the D_i columns in base, per layer; ascending.
        scaling: (E,) per layer.
        biases, router_biases: (E,) or None per layer; None if no layer has one.
        Others: as in routed_lora.
    Returns:
        y (..., D_out) in x's dtype.
    Raises:
        ValueError, TypeError: if an argument is invalid or requires a gradient.
    """
    n, none = len(router_weights), [None] * len(router_weights)
    biases, router_biases = biases or none, router_biases or none
    y = fast_path.routed_lora_banks(
        x, router_weights, lora_As, lora_Bs, top_k, base, starts, rank_offsets, scaling, shared_a, gate,
        renormalize, biases, top_p, threshold, router_biases,
    )  # fmt: skip
    if y is not None:
        return y
    x = checks.floating_input(x, "routed_lora_banks")
    lists = lora_As, lora_Bs, starts, scaling, biases, router_biases
    if n == 0 or any(len(v) != n for v in lists):
        raise ValueError(f"banks: expected {n or 1} of each operand, got {[len(v) for v in lists]}")
    if operands.needs_graph(x, base, *router_weights, *lora_As, *lora_Bs, *router_biases):
        raise ValueError("banks: expected no gradients; for training call routed_lora per layer")
    for i, w in enumerate(router_weights):
        checks.router(x, w, top_k, gate, biases[i], router_biases[i])
        offsets, *_ = checks.experts(
            x, lora_As[i], lora_Bs[i], len(w), rank_offsets, shared_a, (), scaling[i]
        )
    rows = operands.rows_of(x)
    base = operands.base(base, x, x.shape[:-1], base.shape[-1])
    _expect_columns(starts, lora_Bs, base)
    widest = max(lora_Bs, key=lambda b: b.shape[1])
    y = _ops.routed_lora_banks(
        rows, [operands.router_operand(w, x) for w in router_weights],
        *(list(map(operands.rows_contiguous, v)) for v in (lora_As, lora_Bs)), base,
        [checks.selection(b, x) for b in biases],
        [operands.router_bias_operand(b, x) for b in router_biases],
        [checks.scales_of(s, len(w), x) for s, w in zip(scaling, router_weights)],
        offsets, bool(shared_a), list(starts), top_k, gate, bool(renormalize),
        *checks.sparsity(top_p, threshold, gate), operands.plan_for(rows, widest, offsets, top_k, shared_a),
    )  # fmt: skip
    return operands.like(x, y)


def _expect_columns(starts, lora_Bs, base):
    done = 0
    for start, B in zip(starts, lora_Bs):
        if type(start) is not int or start < done:
            raise ValueError(f"starts: expected ascending, disjoint columns, got {starts}")
        done = start + B.shape[1]
    if done > base.shape[1]:
        raise ValueError(f"starts: expected columns within base's {base.shape[1]}, got {done}")
