"""A token router for each task."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..parts import MAX_TASKS, TensorSpec, count, register
from ..reference import accumulator
from .base import Router, decide
from .task import without


@register
@dataclasses.dataclass(frozen=True)
class PerTaskRouter(Router):
    """Each task has a router of its own:  top-k of gate(W_t x / temperature),  W_t (E_t, D_in).

    The parameters are router_weight_0, router_weight_1, ..., so that one can be frozen or added alone.
    A token of task -1 takes no expert.

    Args:
        num_tasks: N, in [1, 65536].
        known: E_t, how many experts the router of each task knows, (N,): the first ones.  None is all.
    Source: Zhang et al. 2025 (BranchLoRA), arXiv 2506.02041, its task-specific routers.
    """

    kind: ClassVar[str] = "per_task"
    reads: ClassVar[tuple[str, ...]] = ("gate", "renormalize", "temperature", "top_p", "threshold")
    num_tasks: int
    known_experts: tuple[int, ...] | None = None

    def __post_init__(self):
        count("num_tasks", self.num_tasks, MAX_TASKS)
        known = self.known_experts
        if known is not None:
            if not isinstance(known, (tuple, list)) or len(known) != self.num_tasks:
                raise ValueError(
                    f"known_experts: expected {self.num_tasks} numbers, got {known!r:.99}"
                )
            numbers = tuple(count("known_experts", E, 4096) for E in known)
            object.__setattr__(self, "known_experts", numbers)

    def experts_of(self, config) -> tuple[int, ...]:
        """E_t of each task, (N,)."""
        known, E = self.known_experts, config.num_experts
        return (E,) * self.num_tasks if known is None else known

    def tensors(self, config, D_in, D_out):
        known = self.experts_of(config)
        if max(known) > config.num_experts or min(known) < config.top_k:
            raise ValueError(
                f"known_experts: expected numbers in [top_k, num_experts] = [{config.top_k},"
                f" {config.num_experts}], got {known}"
            )
        return {f"router_weight_{t}": TensorSpec((E, D_in)) for t, E in enumerate(known)}

    def route(self, x, tensors, batch):
        config, tasks = batch.config, batch.tasks(x)
        known, E = self.experts_of(config), config.num_experts
        weights = [tensors[f"router_weight_{t}"] for t in range(self.num_tasks)]
        wide = torch.promote_types(weights[0].dtype, accumulator(x.dtype))
        logits = x.flatten(0, -2).to(wide) @ torch.cat(weights).to(wide).T  # (T, E_0 + E_1 + ...)
        sizes = torch.tensor(known, device=x.device)
        task = tasks.clamp(min=0)
        first = (sizes.cumsum(0) - sizes)[task, None]  # (T, 1)
        expert = torch.arange(E, device=x.device)
        own = logits.gather(1, (first + expert).clamp(max=logits.shape[1] - 1))  # (T, E)
        if self.known_experts is not None:
            own = own.masked_fill(expert >= sizes[task, None], -torch.inf)
        return without(decide(own, config), tasks < 0)
