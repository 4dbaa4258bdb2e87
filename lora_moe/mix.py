"""mix: the weighted sum of the hidden states of a token's K experts, as an autograd function.

Letters: K picked experts per token, F the width of the hidden states.
"""

from __future__ import annotations

import torch

from .autograd import once


def mix(h: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum over slots j of  w_j h_j,  summed in the weights' dtype; and h, to be used instead of the input.

    (..., K or 1, F), (..., K) -> (..., F), (..., K or 1, F)
    """
    if h.shape[-2] != weights.shape[-1]:
        return (weights.sum(-1, keepdim=True) * h.squeeze(-2)).to(h.dtype), h
    return Mix.apply(h, weights)


class Mix(torch.autograd.Function):
    """y, h = apply(h, w), slot by slot, without a product (..., K, F).

    Other consumers of h use the returned one, so that both gradients are added here, in place.
    """

    @staticmethod
    def forward(ctx, h, w):
        ctx.save_for_backward(h, w)
        ctx.set_materialize_grads(False)
        y = h[..., 0, :] * w[..., :1]
        for j in range(1, w.shape[-1]):
            y = torch.addcmul(y, h[..., j, :].to(y.dtype), w[..., j : j + 1])
        return y.to(h.dtype), h.view_as(h)

    @staticmethod
    @once
    def backward(ctx, saved, dy, dh):
        h, w = saved
        dw = None
        if dy is not None and ctx.needs_input_grad[1]:
            wide = dy.to(w.dtype)
            slots = (torch.linalg.vecdot(row.to(w.dtype), wide) for row in h.unbind(-2))
            # a matrix product per token takes five times as long
            dw = torch.stack(list(slots), -1)
        if dy is not None and ctx.needs_input_grad[0]:
            dy, w = dy.unsqueeze(-2), w.unsqueeze(-1)
            if dh is None:
                dh = (dy * w).to(h.dtype)
            elif dh.dtype == dy.dtype == w.dtype:
                dh = dh.addcmul_(dy, w)  # created by grouped_lora, and not used elsewhere
            else:
                dh = (dh + dy * w).to(h.dtype)
        return dh, dw
