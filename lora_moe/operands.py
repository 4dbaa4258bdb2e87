"""Prepares operands for the operators: rows with unit stride, in the dtypes of their schemas.

checks.py validates them first.  Letters: T tokens, E experts, R rank rows of all experts.
"""

from __future__ import annotations

import torch

from . import backend, checks, plan
from .reference import accumulator


def rows_contiguous(t):
    """Operators require unit stride along columns; rows may have any stride (slices, expanded gradients)."""
    if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 or t.numel() == 0:
        return t
    return t.contiguous()


def rows_of(x):
    """(..., D) -> (T, D) with unit stride along D."""
    if x.dim() != 2:
        x = x[None] if x.dim() == 1 else x.flatten(0, -2)
    return rows_contiguous(x)


def like(x, y):
    """y (T, D_out) with x's leading dimensions."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def base(tensor, x, leading, D_out):
    """Check the base's output, and return it as rows."""
    if tensor is None:
        return None
    why = "the tokens' leading dimensions and D_out"
    checks.matrix("base", tensor, x, (*leading, D_out), why)
    if tensor.dtype != x.dtype:
        raise TypeError(f"base: expected x's dtype {x.dtype}, got {tensor.dtype}")
    return rows_of(tensor)


def router_operand(w, x):
    """The router's weight; it stays fp32 for a bf16 x, as its products are always full fp32."""
    if w is None:
        return None
    acc = accumulator(x.dtype)
    return rows_contiguous(w if w.dtype in (x.dtype, acc) else w.to(acc))


def router_bias_operand(router_bias, x):
    return None if router_bias is None else router_bias.to(accumulator(x.dtype)).contiguous()


def router(w, router_bias, x):
    return router_operand(w, x), router_bias_operand(router_bias, x)


def rounded(x, *parameters):
    """Adapter parameters in x's dtype, with unit stride along columns."""
    return [rows_contiguous(p.to(x.dtype)) for p in parameters]


def dense(*grads):
    """Contiguous gradients; None stays None."""
    return tuple(None if g is None else g.contiguous() for g in grads)


def plan_for(rows, lora_B, offsets, top_k, shared_a):
    """The plan of a call with these operands."""
    serving, shape = backend.serving(rows.device.type), (*rows.shape, lora_B.shape[1])
    return plan.choose(serving, *shape, offsets, top_k, rows.dtype, shared_a)


def needs_graph(*tensors):
    """Whether autograd needs a graph; raises for other kinds of derivatives."""
    checks.first_order(*tensors)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
