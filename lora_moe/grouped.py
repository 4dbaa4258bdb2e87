"""Grouped matrix products: rows sorted by expert times one frozen weight per expert.

    y_i = x_i W_e,   e = the expert of row i

Forward and backward call the grouped product of transformers (torch's if available).  Its own backward is
not used, because under torch.compile it always computes the gradient of all experts' weights.

Letters: T tokens, K picked experts per token, S = T K slots, E experts.
"""

from __future__ import annotations

import torch


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x (S, D_in), weight (E, D_in, D_out) (any strides), ends (E,) int32: end of each expert's rows."""
    x = x.to(weight.dtype)
    if weight.requires_grad and torch.is_grad_enabled():
        return _grouped_mm(x, weight, ends)
    return _Grouped.apply(x, weight, ends)


def _grouped_mm(x, weight, ends):
    from transformers.integrations import moe  # installed if a model has such experts

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
    """x (T, D) -> (S, D): each token once per slot, sorted by expert.

    order (S,) lists the slots sorted by expert, and place (S,) is its inverse.  The backward gathers and sums
    K rows in a fixed order, where index_add_ would use atomics.
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
    """(S, D) sorted by expert -> (S, D) in slot order."""

    @staticmethod
    def forward(ctx, y, order, place):
        ctx.save_for_backward(order)
        return y.index_select(0, place)

    @staticmethod
    def backward(ctx, dy):
        (order,) = ctx.saved_tensors
        return dy.index_select(0, order), None, None
