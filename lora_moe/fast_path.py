"""The fast path: CPU inference calls the C++ operator without the Python checks.

A decoding step calls every layer for one token, for which checks.py takes longer than the products.  The C++
operators check shapes, dtypes and strides themselves.  This module checks what their schemas do not: that
arguments have plain types and that every tensor is on the CPU, so that no other kernel is dispatched.

Each function returns None if the fast path does not apply or the operator rejects an operand; the public
function then continues as usual, and makes the operand contiguous or raises.

Letters: E experts, R rank rows of all experts together.
"""

from __future__ import annotations

from itertools import repeat
from math import prod

import torch
from torch.autograd import forward_ad

from . import backend, checks, plan
from .reference import ALL_KEPT
from .routing import Routing

REFUSED = (ValueError, TypeError)  # raised by operators for operands that they reject

_ops = torch.ops.lora_moe


def routed_lora(
    x, router_weight, lora_A, lora_B, top_k, rank_offsets, scaling, shared_a, base, gate, renormalize,
    bias, top_p, threshold, frozen, router_bias,
):  # fmt: skip
    """functional.routed_lora's y and Routing, or None."""
    tensors, optional = (x, router_weight, lora_B, lora_A), (base, bias, router_bias)
    offsets = _offsets(tensors, optional, rank_offsets, top_k, gate)
    if offsets is None:
        return None
    E, leading = router_weight.shape[0], x.shape[:-1]
    if base is not None and (base.layout != torch.strided or base.shape[:-1] != leading):
        return None
    if not isinstance(scaling, torch.Tensor):
        scaling = checks.scales_of(scaling, E, x)
    elif not scaling.is_cpu:
        return None
    if type(frozen) is not tuple or frozen:  # unused without gradients, but still checked
        checks.frozen_ids(frozen, E)
    if len(leading) != 1:
        x = x.reshape(prod(leading), x.shape[-1])
        base = None if base is None else base.reshape(x.shape[0], base.shape[-1])
    given = top_p is not None or threshold is not None
    drop = checks.sparsity(top_p, threshold, gate) if given else (ALL_KEPT, 0.0)
    try:
        y, indices, weights, logits, mean_prob, lse, counts, _ = _ops.routed_lora.default(
            x, router_weight, lora_A, lora_B, base, bias, router_bias, scaling, offsets, bool(shared_a),
            top_k, gate, bool(renormalize), *drop, plan.SEGMENTED,
        )  # fmt: skip
    except REFUSED:
        return None
    if len(leading) != 1:
        y = y.view(*leading, y.shape[1])
    return y, Routing(indices, weights, counts, logits, mean_prob, lse)


def routed_lora_banks(
    x, router_weights, lora_As, lora_Bs, top_k, base, starts, rank_offsets, scaling, shared_a, gate,
    renormalize, biases, top_p, threshold, router_biases,
):  # fmt: skip
    """functional.routed_lora_banks' y, or None."""
    if not router_weights or not lora_Bs or {*map(type, starts)} != {int}:
        return None
    tensors = x, router_weights[0], lora_Bs[0], base, *router_weights, *lora_As, *lora_Bs, *scaling
    offsets = _offsets(tensors, (*biases, *router_biases), rank_offsets, top_k, gate)
    if offsets is None or x.dim() != 2:
        return None
    given = top_p is not None or threshold is not None
    drop = checks.sparsity(top_p, threshold, gate) if given else (ALL_KEPT, 0.0)
    try:
        return _ops.routed_lora_banks.default(
            x, router_weights, lora_As, lora_Bs, base, biases, router_biases, scaling, offsets,
            bool(shared_a), starts, top_k, gate, bool(renormalize), *drop, plan.SEGMENTED,
        )  # fmt: skip
    except REFUSED:
        return None


# map() avoids a Python frame per operand, which would cost as much as the checks that are saved
_TENSOR, _OPTIONAL = repeat(torch.Tensor), repeat((torch.Tensor, type(None)))
_IS_CPU, _TRUE = repeat("is_cpu"), repeat(True)


def _offsets(tensors, optional, rank_offsets, top_k, gate):
    """The rank offsets if the fast path applies, else None.  tensors: x, router_weight, lora_B, ..."""
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or backend.serving("cpu") != "cpp"
        or plan._forced not in (None, plan.SEGMENTED)
        or torch.is_autocast_enabled("cpu")
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or not all(map(isinstance, tensors, _TENSOR))
        or not all(map(isinstance, optional, _OPTIONAL))
        or not all(map(getattr, (*tensors, *optional), _IS_CPU, _TRUE))  # True for None
    ):
        return None
    x, w, b = tensors[:3]
    if x.layout != torch.strided or not x.dim() or w.dim() != 2 or b.dim() != 2:
        return None
    E, R = w.shape[0], b.shape[0]
    if type(top_k) is not int or not 1 <= top_k <= E or type(gate) is not str:
        return None
    if type(rank_offsets) is int:
        return checks.rank_offsets_of(rank_offsets, E)
    if type(rank_offsets) not in (list, tuple) or {*map(type, rank_offsets)} != {int}:
        return None
    return rank_offsets if min(rank_offsets) == 0 and max(rank_offsets) == R else None
