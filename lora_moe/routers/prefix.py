"""PrefixRouter: each task picks a rank, as a prefix of the experts (MoRE)."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch
from torch import nn

from ..components import MAX_TASKS, TensorSpec, count, register
from ..routing import Routing
from .base import Router
from .task import without
from .threshold import with_logits


@register
@dataclasses.dataclass(frozen=True)
class PrefixRouter(Router):
    """Experts 0 .. e of task t, each with weight 1 + p_e - stop(p_e);  p = softmax(W z_t + c),  e = argmax p.

    Expert j is the j-th part of one LoRA's rank, so a prefix is a LoRA of smaller rank.  The weight is 1
    with the gradient of p_e (straight-through).  A token of task -1 uses no expert.

    Args:
        num_tasks: N, the rows of the task embedding z (N, D_in).
    Source: Zhang et al. 2025 (MoRE), arXiv 2505.22694.
    """

    kind: ClassVar[str] = "prefix"
    num_tasks: int

    def __post_init__(self):
        count("num_tasks", self.num_tasks, MAX_TASKS)

    def tensors(self, config, D_in, D_out):
        E = config.num_experts
        fan_in = functools.partial(nn.init.kaiming_uniform_, nonlinearity="relu")
        return {
            "router_weight": TensorSpec((E, D_in), fan_in),
            "router_bias": TensorSpec((E,), nn.init.zeros_),
            "task_embedding": TensorSpec(
                (self.num_tasks, D_in), functools.partial(nn.init.normal_, std=0.01)
            ),
        }

    def route(self, x, tensors, batch):
        tasks, E = batch.tasks(x), batch.config.num_experts
        logits = tensors["task_embedding"] @ tensors["router_weight"].T + tensors["router_bias"]
        p, last = torch.softmax(logits, 1).max(1, keepdim=True)  # (N, 1)
        experts = torch.arange(E, device=x.device)
        ids = torch.where(experts <= last, experts, -1)  # (N, E)
        gate = (1 + p - p.detach()).expand(-1, E)
        row = tasks.clamp(min=0)
        routing = Routing.from_ids(ids[row], gate[row], num_experts=E)
        return without(with_logits(routing, logits[row]), tasks < 0)
