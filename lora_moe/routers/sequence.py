"""SequenceRouter: one routing decision per sequence, from its first or its mean token."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..components import first_of, one_of, register
from ..routing_cache import keep, kept_decision
from ..rows import for_tokens
from .base import Router
from .token import TokenRouter

ROUTE_BY = ("first", "mean")


@register
@dataclasses.dataclass(frozen=True)
class SequenceRouter(Router):
    """All tokens of a sequence use the routing that `then` computes for its first or mean token.

    Padding is excluded, and if the model is called with labels, so are tokens from the first labeled one
    on, which do not exist yet in generation.  Decoding with a cache, in this thread, reuses the prompt's
    routing, so the logits of `generate` differ from those of one forward over prompt and answer.  In a
    causal model the first token attends to no other: use the mean if all sequences start the same way.

    Args:
        by: "first" or "mean".
        then: the router that is applied; None is the token router.
    """

    kind: ClassVar[str] = "sequence"
    by: str = "first"
    then: Router | None = None

    def __post_init__(self):
        one_of("by", self.by, ROUTE_BY)
        if self.then is not None and not isinstance(self.then, Router):
            raise ValueError(f"then: expected a router or None, got {type(self.then).__name__}")

    @property
    def inner(self) -> Router:
        return TokenRouter() if self.then is None else self.then

    @property
    def task_count(self):
        return self.inner.task_count

    def fields_read(self):
        return self.inner.fields_read()

    def tensors(self, config, D_in, D_out):
        return self.inner.tensors(config, D_in, D_out)

    def per_sample(self, x, tensors, batch):
        if x.dim() != 3:
            raise ValueError(
                f"x: expected (B, L, D_in) to route per sequence, got {tuple(x.shape)}"
            )
        kept = kept_decision(batch.layer, x.shape[0])
        if kept is None:
            kept = self.inner.route(self.row(x, batch), tensors, batch)
            keep(batch.layer, kept)
        return kept

    def route(self, x, tensors, batch):
        return for_tokens(self.per_sample(x, tensors, batch), x)

    def row(self, x: torch.Tensor, batch) -> torch.Tensor:
        """The router's input for each sequence.  (B, L, D_in) -> (B, D_in)"""
        mask = batch.prompt(x)
        if mask is None:
            return x[:, 0] if self.by == "first" else x.mean(1)
        if self.by == "first":
            return x[torch.arange(x.shape[0], device=x.device), first_of(mask)]
        total = (mask[:, None].to(x.dtype) @ x).squeeze(1)  # (B, D_in)
        return total / mask.sum(1, keepdim=True).clamp(min=1)
