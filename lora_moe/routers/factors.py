"""FactorRouter: picks rank-1 factors of A, then of B given those of A (conditional MixLoRA)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..components import TensorSpec, register
from ..reference import accumulator
from ..routing import Routing
from ..rows import adapter_rows
from .base import Router
from .threshold import with_logits


@register
@dataclasses.dataclass(frozen=True)
class FactorRouter(Router):
    """2 K slots: K rows i of A by p, then K rows l of B by q, which depends on the picked rows of A.

        p = softmax(W x)                                                          i = top-K of p
        q = softmax(softmax(V x) + weight * softmax(sum_k softmax(U_k a_{i_k})))  l = top-K of q

    Sorted best first; the j-th of A is paired with the j-th of B, see UnpairedMiddle.

    Args:
        scored: weight the factors by p and q, each divided by the sum over the picked.  False uses no
            weights, as in the public code, so the routers get no gradient.
        weight: weight of the condition on A, at least 0.
    Source: Shen et al. 2024, arXiv 2402.15896.
    """

    kind: ClassVar[str] = "factors"
    scored: bool = True
    weight: float = 1.0

    def __post_init__(self):
        if not isinstance(self.scored, bool):
            raise ValueError(f"scored: expected a bool, got {self.scored!r:.99}")
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not (number and 0 <= self.weight <= 1e6):
            raise ValueError(f"weight: expected a number in [0, 1e6], got {self.weight!r:.99}")

    def tensors(self, config, D_in, D_out):
        E, K = config.num_experts, config.top_k
        return {
            "router_weight": TensorSpec((E, D_in)),
            "router_weight_b": TensorSpec((E, D_in)),
            "router_weight_ab": TensorSpec((K, E, D_in)),
        }

    def route(self, x, tensors, batch):
        E, K = batch.config.num_experts, batch.config.top_k
        weight = tensors["router_weight"]
        wide = torch.promote_types(weight.dtype, accumulator(x.dtype))
        rows = x.flatten(0, -2).to(wide)
        both = torch.cat([weight, tensors["router_weight_b"]]).to(wide)
        logits, own = (rows @ both.T).chunk(2, 1)  # (T, E) each
        g, of_a = torch.softmax(logits, 1).topk(K, 1)  # (T, K)
        picked = adapter_rows(batch.layer)[0].to(wide)[of_a]  # (T, K, D_in)
        seen = torch.einsum("tkd,ked->tke", picked, tensors["router_weight_ab"].to(wide))
        condition = torch.softmax(torch.softmax(seen, 2).sum(1), 1)  # (T, E)
        q = torch.softmax(torch.softmax(own, 1) + self.weight * condition, 1)
        h, of_b = q.topk(K, 1)
        g, h = (w / w.sum(1, keepdim=True) if self.scored else torch.ones_like(w) for w in (g, h))
        ids, weights = torch.cat([of_a, of_b], 1), torch.cat([g, h], 1)
        return with_logits(Routing.from_ids(ids, weights, num_experts=E), logits)
