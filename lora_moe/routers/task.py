"""TaskRouter: routing by task, from a row of a table or with one expert per task."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch
from torch import nn

from ..components import MAX_TASKS, TensorSpec, count, normal, one_of, register
from ..routing import Routing
from .base import Router, decide

TABLES = ("logits", "weights", "expert")


@register
@dataclasses.dataclass(frozen=True)
class TaskRouter(Router):
    """Tokens of task t use the experts in row t of a table, independent of their values.

    logits    top-k of gate(G_t / temperature), with trainable G (num_tasks, E)
    weights   all experts with trainable weights G_t, initially 1 / E
    expert    only expert t, with weight 1; no parameters

    A token of task -1 uses no expert.

    Args:
        num_tasks: N, in [1, 65536]; at most E for "expert".
        table: "logits", "weights" or "expert".
    """

    kind: ClassVar[str] = "task"
    num_tasks: int
    table: str = "logits"

    def __post_init__(self):
        count("num_tasks", self.num_tasks, MAX_TASKS)
        one_of("table", self.table, TABLES)

    def fields_read(self):
        fields = ("gate", "renormalize", "temperature", "top_p", "threshold")
        return fields if self.table == "logits" else ()

    def tensors(self, config, D_in, D_out):
        E = config.num_experts
        if self.table == "expert":
            if self.num_tasks > E:
                raise ValueError(
                    f"num_tasks: expected at most {E}, one expert per task, got {self.num_tasks}"
                )
            return {}
        even = functools.partial(nn.init.constant_, val=1 / E)
        init = even if self.table == "weights" else normal
        return {"router_table": TensorSpec((self.num_tasks, E), init)}

    def per_sample(self, x, tensors, batch):
        tasks = batch.sample_tasks(x)
        return None if tasks is None else self.of(tasks, tensors, batch.config)

    def route(self, x, tensors, batch):
        return self.of(batch.tasks(x), tensors, batch.config)

    def of(self, tasks: torch.Tensor, tensors, config) -> Routing:
        """The routing for tasks (T,), -1 for none."""
        if self.table == "expert":
            return Routing.from_ids(tasks, num_experts=config.num_experts)
        rows = tensors["router_table"][tasks.clamp(min=0)]  # (T, E)
        decided = Routing.from_gates(rows) if self.table == "weights" else decide(rows, config)
        return without(decided, tasks < 0)


def without(routing: Routing, none: torch.Tensor) -> Routing:
    """The routing with empty slots, also in counts, for the tokens in `none` (T,) bool."""
    ids = routing.indices.masked_fill(none[:, None], -1)
    weights = routing.weights.masked_fill(none[:, None], 0)
    counts = Routing.from_ids(ids, num_experts=routing.num_experts).counts
    return routing._replace(indices=ids, weights=weights, counts=counts)
