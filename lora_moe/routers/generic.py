"""GenericRouter: a generic expert, the task's expert, and top-k shared experts (MLoRE)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from ..components import MAX_TASKS, TensorSpec, count, register
from ..reference import accumulator
from ..routing import Routing
from .base import Router
from .noisy import noisy_logits


@register
@dataclasses.dataclass(frozen=True)
class GenericRouter(Router):
    """Experts 0 and 1 + t with weight 1, and the top-k of p = softmax(W_t x) among the M remaining experts.

    The weights are p without renormalization.  In training, the logits have noise (softplus(V_t x) +
    0.01) * n.  Losses and statistics use the logits of the M shared experts; losses.cv_squared is the paper's
    balance loss.  A token of task -1 uses only expert 0.

    Args:
        num_tasks: N; the configuration has E = 1 + N + M experts.
        noise: learned noise in training.
    Source: Yang et al. 2024 (MLoRE), arXiv 2403.17749.
    """

    kind: ClassVar[str] = "generic"
    num_tasks: int
    noise: bool = True

    def __post_init__(self):
        count("num_tasks", self.num_tasks, MAX_TASKS)
        if not isinstance(self.noise, bool):
            raise ValueError(f"noise: expected a bool, got {self.noise!r:.99}")

    def tensors(self, config, D_in, D_out):
        M = config.num_experts - 1 - self.num_tasks
        if config.top_k > M:
            raise ValueError(
                f"top_k: expected at most {max(M, 0)}, the number of experts without the generic one and"
                f" the {self.num_tasks} task experts, got {config.top_k}"
            )
        if config.balance_coef:
            raise ValueError(
                "balance_coef: expected 0 with GenericRouter, which balances only shared experts (add"
                f" losses.router_loss(model, losses.cv_squared)), got {config.balance_coef:g}"
            )
        shape = (self.num_tasks, M, D_in)
        found = {"router_weight": TensorSpec(shape)}
        if self.noise:
            found["noise_weight"] = TensorSpec(shape, nn.init.zeros_)
        return found

    def route(self, x, tensors, batch):
        config, tasks = batch.config, batch.tasks(x)
        weight = tensors["router_weight"]
        wide = torch.promote_types(weight.dtype, accumulator(x.dtype))
        rows = x.flatten(0, -2).to(wide)
        logits = noisy = _own(rows, weight, tasks)  # (T, M)
        if self.noise and batch.training:
            noisy = noisy_logits(logits, _own(rows, tensors["noise_weight"], tasks))
        shared, clean = (
            Routing.from_logits(v, config.top_k, renormalize=False) for v in (noisy, logits)
        )
        none = (tasks < 0)[:, None]
        own = torch.where(none, -1, 1 + tasks[:, None])  # (T, 1)
        others = (1 + self.num_tasks + shared.indices).masked_fill(none, -1)
        ids = torch.cat([torch.zeros_like(own), own, others], 1)
        one = torch.ones_like(shared.weights[:, :1])
        weights = torch.cat([one, one, shared.weights], 1)
        routing = Routing.from_ids(ids, weights, num_experts=config.num_experts)
        return routing._replace(logits=clean.logits, mean_prob=clean.mean_prob, lse=clean.lse)


def _own(rows, weights, tasks):
    """Each row's product with its task's matrix.  (T, D), (N, M, D), (T,) -> (T, M)"""
    N, M, D = weights.shape
    every = rows @ weights.to(rows).reshape(N * M, D).T  # (T, N M)
    task = tasks.clamp(min=0)[:, None, None].expand(-1, 1, M)
    return every.view(-1, N, M).gather(1, task).squeeze(1)
