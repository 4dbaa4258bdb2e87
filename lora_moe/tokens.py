"""Finds the padding of a forward, from the caller's mask or the model's attention mask."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .context import Decision, mask_in_call, thread
from .notices import tell_once


class Tokens(NamedTuple):
    """A forward's input shape and mask, from which the tokens that count can be computed later."""

    shape: torch.Size  # of x
    mask: torch.Tensor | None = None  # the caller's or the model's

    def counted(self) -> torch.Tensor | None:
        """(T,) bool, or None if all tokens count; warns once about a mask that does not fit."""
        if self.mask is None:
            return None
        fitted = fit_mask(self.mask, self.shape)
        if fitted is None:
            _tell_unfit(self.mask, self.shape)
        elif fitted.device.type == "cpu" and bool(fitted.all()):
            return None
        return fitted


def tokens_of(x: torch.Tensor, decision: Decision) -> Tokens:
    if decision.mask is not None or not thread.calls:
        return Tokens(x.shape, decision.mask)
    return Tokens(x.shape, mask_in_call(x))


def fit_mask(mask, shape) -> torch.Tensor | None:
    """(T,) bool for an input of this shape, or None if the mask does not fit.

    A mask (B, L) fits x (B, L, ...), x (L, B, ...) as in XLNet, x (B * L, D), and x (B, l, D) with
    l < L, for which its last l columns apply, as with a cache.
    """
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (1, 2):
        return None
    tokens = math.prod(shape[:-1])
    if mask.numel() == tokens:
        if mask.dim() == 2 and mask.shape != shape[:2] and mask.T.shape == shape[:2]:
            mask = mask.T
        return mask.reshape(-1) != 0
    matrices = mask.dim() == 2 and len(shape) == 3
    if matrices and mask.shape[0] == shape[0] and shape[1] < mask.shape[1]:
        return mask[:, mask.shape[1] - shape[1] :].reshape(-1) != 0
    return None


def _tell_unfit(mask, shape):
    got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    tell_once(
        "mask",
        f"an attention mask {got} does not fit an input {tuple(shape)}, so padding is unknown and all"
        " tokens count in losses and statistics; pass one number per token to"
        " lora_moe.use_routing(model, mask=)",
    )
