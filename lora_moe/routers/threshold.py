"""ThresholdRouter: a learned threshold per token, which picks none to all experts (AdaMoLE)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import nn

from ..components import TensorSpec, register
from ..reference import accumulator
from ..routing import Routing
from .base import Router


@register
@dataclasses.dataclass(frozen=True)
class ThresholdRouter(Router):
    """g_e = relu(p_e - tau) / sum_e relu(p_e - tau),   p = softmax(W x),   tau = tau_max sigmoid(v x + c).

    A token whose gates are all at most tau uses no expert.

    Args:
        max_threshold: tau_max, in (0, 1]; None is 1 / E, with which every token uses at least one.
    Source: Liu and Luo 2024 (AdaMoLE), arXiv 2405.00361.
    """

    kind: ClassVar[str] = "learned_threshold"
    max_threshold: float | None = None

    def __post_init__(self):
        high = self.max_threshold
        number = isinstance(high, (int, float)) and not isinstance(high, bool)
        if high is not None and not (number and math.isfinite(high) and 0 < high <= 1):
            raise ValueError(
                f"max_threshold: expected None or a number in (0, 1], got {high!r:.99}"
            )

    def tensors(self, config, D_in, D_out):
        return {
            "router_weight": TensorSpec((config.num_experts, D_in)),
            "threshold_weight": TensorSpec((1, D_in)),
            "threshold_bias": TensorSpec((1,), nn.init.zeros_),
        }

    def highest(self, num_experts: int) -> float:
        """tau_max."""
        return 1 / num_experts if self.max_threshold is None else self.max_threshold

    def route(self, x, tensors, batch):
        E = batch.config.num_experts
        weight = tensors["router_weight"]
        wide = torch.promote_types(weight.dtype, accumulator(x.dtype))
        rows = torch.cat([weight, tensors["threshold_weight"]]).to(wide)
        logits, tau = (x.flatten(0, -2).to(wide) @ rows.T).split((E, 1), 1)  # (T, E), (T, 1)
        return decide_above(logits, tau + tensors["threshold_bias"].to(wide), self.highest(E))


def decide_above(logits: torch.Tensor, tau: torch.Tensor, highest: float) -> Routing:
    """ThresholdRouter's routing from W x (T, E) and v x + c (T, 1)."""
    E = logits.shape[1]
    p = torch.softmax(logits, 1)
    left = torch.relu(p - highest * torch.sigmoid(tau))
    total = left.sum(1, keepdim=True)
    ids = torch.arange(E, device=logits.device).masked_fill(left == 0, -1)  # (T, E)
    gates = left / torch.where(total == 0, 1, total)
    return with_logits(Routing.from_ids(ids, gates, num_experts=E), logits)


def with_logits(routing: Routing, logits: torch.Tensor) -> Routing:
    """Add the logits (T, E) of a softmax router, for losses and statistics."""
    mean_prob = torch.softmax(logits, 1).sum(0) / max(logits.shape[0], 1)
    return routing._replace(logits=logits, mean_prob=mean_prob, lse=torch.logsumexp(logits, 1))
