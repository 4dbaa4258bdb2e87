"""NoisyRouter: the token router with noise and dropped experts in training."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from ..components import TensorSpec, register
from ..reference import accumulator
from .base import Router, decide

FLOOR = 0.01  # of learned noise


@register
@dataclasses.dataclass(frozen=True)
class NoisyRouter(Router):
    """top-k of gate((W x + noise) / temperature),   noise = std * n   or   (softplus(V x) + 0.01) * n.

    n is standard normal per token and expert; there is no noise in evaluation mode.  Losses and statistics
    use the logits of all experts without noise.

    Args:
        std: standard deviation of the noise, in [0, 1e6).
        learned: standard deviation from the token through V (E, D_in), initially zero; std must be 0.
        expert_dropout: in [0, 1): the probability that an expert is dropped for a token; at least one
            always remains.
    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 3-5 (learned).
    """

    kind: ClassVar[str] = "noisy"
    config_fields: ClassVar[tuple[str, ...]] = ("gate", "renormalize", "temperature")
    std: float = 0.0
    learned: bool = False
    expert_dropout: float = 0.0

    def __post_init__(self):
        for name, high in (("std", 1e6), ("expert_dropout", 1.0)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and 0 <= value < high):
                raise ValueError(f"{name}: expected a number in [0, {high:g}), got {value!r:.99}")
        if not isinstance(self.learned, bool) or (self.learned and self.std):
            raise ValueError(
                f"learned: expected a bool, and std=0 if it is True, got {self.learned!r:.99} and"
                f" std={self.std:g}"
            )

    def tensors(self, config, D_in, D_out):
        shape = (config.num_experts, D_in)
        found = {"router_weight": TensorSpec(shape)}
        if self.learned:
            found["noise_weight"] = TensorSpec(shape, nn.init.zeros_)
        return found

    def route(self, x, tensors, batch):
        config, weight = batch.config, tensors["router_weight"]
        wide = torch.promote_types(weight.dtype, accumulator(x.dtype))
        rows = x.flatten(0, -2).to(wide)
        logits = noisy = rows @ weight.to(wide).T  # (T, E)
        if not batch.training:
            return decide(logits, config)
        if self.learned:
            noisy = noisy_logits(logits, rows @ tensors["noise_weight"].to(wide).T)
        elif self.std:
            noisy = logits + torch.randn_like(logits) * self.std
        if self.expert_dropout:
            noisy = noisy.masked_fill(dropped(noisy, self.expert_dropout), -torch.inf)
        chosen, clean = decide(noisy, config), decide(logits, config)
        return chosen._replace(logits=clean.logits, mean_prob=clean.mean_prob, lse=clean.lse)


def noisy_logits(logits: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """logits + (softplus(spread) + 0.01) * n, n normal; all (T, E)."""
    return logits + torch.randn_like(logits) * (nn.functional.softplus(spread) + FLOOR)


def dropped(logits: torch.Tensor, probability: float) -> torch.Tensor:
    """(T, E) bool, True with this probability, except for one random expert per token."""
    draw = torch.rand_like(logits)
    return (draw < probability) & (draw < draw.amax(1, keepdim=True))
