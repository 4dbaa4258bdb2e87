"""Rule: the non-tensor inputs of the operators, which describe how a bank of experts routes.

They are passed as a constant string, so that compiled graphs and caches contain none of our objects.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import torch

from ..checks import rank_offsets_of
from ..config import FFN, LoraMoeConfig
from ..routers import NoisyRouter, ThresholdRouter
from ..routers.threshold import decide_above
from ..routing import Routing


@dataclasses.dataclass(frozen=True)
class Rule:
    """One bank's place in the layer's output, its ranks, and the token router's fields.

    start, stop      its columns in this rank's output
    max_threshold    of a ThresholdRouter; None for the token router
    """

    start: int
    stop: int
    offsets: tuple[int, ...]
    shared_a: bool
    top_k: int
    gate: str
    renormalize: bool
    top_p: float | None
    threshold: float | None
    max_threshold: float | None = None

    @property
    def experts(self) -> int:
        return len(self.offsets) - 1

    def decide(self, logits: torch.Tensor, bias: torch.Tensor | None) -> Routing:
        """The routing of logits (T, E), or (T, E + 1) with the logit of a learned threshold last."""
        if self.max_threshold is None:
            return Routing.from_logits(
                logits, self.top_k, gate=self.gate, renormalize=self.renormalize, bias=bias,
                top_p=self.top_p, threshold=self.threshold,
            )  # fmt: skip
        return decide_above(*logits.split((self.experts, 1), 1), self.max_threshold)


def rule_of(config: LoraMoeConfig, start: int, stop: int) -> Rule:
    """The rule of a configuration that `refusal` accepts."""
    high = None
    if isinstance(config.router, ThresholdRouter):
        high = config.router.highest(config.num_experts)
    return Rule(
        start, stop, tuple(rank_offsets_of(config.rank_offsets, config.num_experts)), config.shared_a,
        config.top_k, config.gate, config.normalizes, config.top_p, config.threshold, high,
    )  # fmt: skip


def refusal(config: LoraMoeConfig) -> str | None:
    """Why these experts cannot be served, or None; routing must be per token."""
    router, middle = config.router, config.middle
    if config.target_parameters:
        return (
            "LoRAs on the model's own experts (target_parameters); only linear layers are supported"
        )
    if config.placement == FFN:
        return f"experts of FFNs (placement={FFN!r}); only linear layers are supported"
    if middle is not None:
        return (
            f"{type(middle).__name__} replaces the gate between A and B; only the gate is supported"
        )
    if router is not None and not isinstance(router, (NoisyRouter, ThresholdRouter)):
        needs = "the tasks of a request" if router.task_count else "more than a token's input"
        return f"{type(router).__name__} depends on {needs}; only token routers are supported"
    return None


def to_text(rules: tuple[Rule, ...]) -> str:
    return json.dumps([dataclasses.astuple(rule) for rule in rules])


@functools.lru_cache(maxsize=4096)
def from_text(text: str) -> tuple[Rule, ...]:
    """The inverse of to_text."""
    return tuple(Rule(a, b, tuple(offsets), *rest) for a, b, offsets, *rest in json.loads(text))


@functools.lru_cache(maxsize=4096)
def alike(rules: tuple[Rule, ...]) -> bool:
    """Whether the banks differ only in their columns; banks with learned thresholds run separately."""
    kinds = {dataclasses.replace(rule, start=0, stop=0) for rule in rules}
    return len(kinds) == 1 and rules[0].max_threshold is None
