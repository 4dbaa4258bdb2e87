"""PerTaskRouter: one token router per task (BranchLoRA)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from .. import functional as F
from ..components import MAX_TASKS, TensorSpec, count, register
from .base import Router, decide
from .task import without
from .token import tempered


@register
@dataclasses.dataclass(frozen=True)
class PerTaskRouter(Router):
    """Each task has its own router:  top-k of gate(W_t x / temperature),  W_t (E_t, D_in).

    The parameters are router_weight_0, router_weight_1, ..., so that each can be frozen or added separately.
    A token of task -1 uses no expert.

    Args:
        num_tasks: N, in [0, 65536]; 0 if routers are added later.
        known_experts: E_t, (N,): each router picks among its first E_t experts.  None is all.
    Source: Zhang et al. 2025 (BranchLoRA), arXiv 2506.02041, its task-specific routers.
    """

    kind: ClassVar[str] = "per_task"
    config_fields: ClassVar[tuple[str, ...]] = (
        "gate",
        "renormalize",
        "temperature",
        "top_p",
        "threshold",
    )
    num_tasks: int
    known_experts: tuple[int, ...] | None = None

    def __post_init__(self):
        count("num_tasks", self.num_tasks, MAX_TASKS, low=0)
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
        if known and (max(known) > config.num_experts or min(known) < config.top_k):
            raise ValueError(
                f"known_experts: expected numbers in [top_k, num_experts] = [{config.top_k},"
                f" {config.num_experts}], got {known}"
            )
        return {f"router_weight_{t}": TensorSpec((E, D_in)) for t, E in enumerate(known)}

    def route(self, x, tensors, batch):
        config, task = batch.config, batch.one_task
        known, E = self.experts_of(config), config.num_experts
        if task is not None and task >= 0 and known[task] == E:
            weight, _ = tempered(config, tensors[f"router_weight_{task}"], None)
            return F.router_topk(
                x, weight, config.top_k, gate=config.gate, renormalize=config.normalizes,
                top_p=config.top_p, threshold=config.threshold,
            )  # fmt: skip
        tasks = batch.tasks(x)
        of_all = [self._logits(x, tensors[f"router_weight_{t}"], E) for t in range(self.num_tasks)]
        rows = torch.arange(tasks.shape[0], device=x.device)
        logits = torch.stack(of_all)[tasks.clamp(min=0), rows]  # (T, E)
        return without(decide(logits, config), tasks < 0)

    def _logits(self, x, weight, E):
        """(T, E), -inf for experts beyond the router's."""
        logits = F.router_topk(x, weight, 1).logits  # products in full precision
        return nn.functional.pad(logits, (0, E - weight.shape[0]), value=-torch.inf)
