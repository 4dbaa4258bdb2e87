"""UniversalRouter: two slots per token, an expert for all tasks and the task's expert (C-LoRAE)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from .. import functional as F
from ..components import MAX_TASKS, TensorSpec, count, one_of, register
from ..reference import GATES
from ..routing import Routing
from .base import Router

PAIR_GATES = (*GATES, "sum")


@register
@dataclasses.dataclass(frozen=True)
class UniversalRouter(Router):
    """y += g1(x) s_0 B_0 A_0 x + g2(x) s_t B_t A_t x;  expert 0 is universal, expert 1 + t belongs to task t.

    A token of task -1 uses only expert 0, with weight g1(x).

    Args:
        num_tasks: N = E - 1; 0 means only the universal expert, with weight 1.
        gate: [g1, g2] is "softmax" or "sigmoid" of the two logits W x, W (2, D_in); "sum" is 1 and 1.
    Source: C-LoRAE (IJCAI 2025), arXiv 2505.06303; the two logits from x are inferred.
    """

    kind: ClassVar[str] = "universal"
    num_tasks: int
    gate: str = "softmax"

    def __post_init__(self):
        count("num_tasks", self.num_tasks, MAX_TASKS, low=0)
        one_of("gate", self.gate, PAIR_GATES)

    @property
    def task_count(self):
        return self.num_tasks or None

    @property
    def gated(self) -> bool:
        return self.num_tasks > 0 and self.gate != "sum"

    def tensors(self, config, D_in, D_out):
        if config.num_experts != self.num_tasks + 1:
            raise ValueError(
                f"num_experts: expected num_tasks + 1 = {self.num_tasks + 1}, got {config.num_experts}"
            )
        return {"router_weight": TensorSpec((2, D_in))} if self.gated else {}

    def route(self, x, tensors, batch):
        E = batch.config.num_experts
        if E == 1:
            zeros = torch.zeros(x[..., 0].numel(), dtype=torch.int32, device=x.device)
            return Routing.from_ids(zeros, num_experts=1)
        tasks = batch.tasks(x)
        second = torch.where(tasks < 0, tasks, tasks + 1)  # (T,)
        if not self.gated:
            return Routing.from_ids(
                torch.stack([torch.zeros_like(second), second], 1), num_experts=E
            )
        gate = F.router_topk(x, tensors["router_weight"], 2, gate=self.gate, renormalize=False)
        ids = torch.where(gate.indices == 0, 0, second[:, None])  # (T, 2), larger weight first
        return Routing.from_ids(ids, gate.weights, num_experts=E)
