"""Products of rows that are sorted by their expert with a weight per expert, the weights frozen.

    y_i = x_i W_e,   e = the expert of row i

transformers' own grouped product does it (torch's where that serves), forward and backward.  Its backward
is not taken: under torch.compile it would make the gradient of all experts' weights, wanted or not.

Letters: T tokens, K picked experts per token, S = T K slots, E experts.
"""

from __future__ import annotations

import torch


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x (S, D_in), weight (E, D_in, D_out) in any strides, ends (E,) int32: one past each expert's rows."""
    x = x.to(weight.dtype)
    if weight.requires_grad and torch.is_grad_enabled():
        return _grouped_mm(x, weight, ends)
    return _Grouped.apply(x, weight, ends)


def _grouped_mm(x, weight, ends):
    from transformers.integrations import moe  # whoever has such experts has it

    return moe._grouped_mm(x, weight, ends)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(weight, ends)
        return _grouped_mm(x, weight, ends)

    @staticmethod
    def backward(ctx, dy):
        weight, ends = ctx.saved_tensors
        return _grouped_mm(dy.contiguous(), weight.transpose(-2, -1), ends), None, None


class SortTokens(torch.autograd.Function):
    """x (T, D) -> (S, D): each token once per slot, in the order of the experts.

    order (S,) are the slots sorted by expert, place (S,) its inverse.  The backward gathers and sums K rows,
    in one order: index_add_ would do it by atomics.
    """

    @staticmethod
    def forward(ctx, x, order, place, K):
        ctx.save_for_backward(place)
        ctx.K = K
        return x.index_select(0, order // K)

    @staticmethod
    def backward(ctx, dy):
        (place,) = ctx.saved_tensors
        dx = dy.index_select(0, place).unflatten(0, (-1, ctx.K)).sum(1)
        return dx, None, None, None


class Unsort(torch.autograd.Function):
    """(S, D), sorted by expert -> (S, D), slot by slot."""

    @staticmethod
    def forward(ctx, y, order, place):
        ctx.save_for_backward(order)
        return y.index_select(0, place)

    @staticmethod
    def backward(ctx, dy):
        (order,) = ctx.saved_tensors
        return dy.index_select(0, order), None, None
