"""PolyRouter: sigmoid gates from a table row per task, sampled in training (Polytropon)."""

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


@register
@dataclasses.dataclass(frozen=True)
class PolyRouter(Router):
    """Top-k of  g = sigmoid(G_t) / (sum over the picked)  for task t;  in training  sigmoid(G_t + n).

    n = log u - log(1 - u), u uniform in (0, 1), one number per sample and expert: a sample of the relaxed
    Bernoulli distribution of temperature 1.  G (num_tasks, E) is initially uniform in +-1e-3.  A token of
    task -1 uses no expert.  Auxiliary losses use the logits without noise.

    Args:
        num_tasks: N, in [1, 65536].
    Source: Ponti et al. 2023 (Polytropon), arXiv 2202.13914, and PEFT's Poly.
    """

    kind: ClassVar[str] = "poly"
    num_tasks: int

    def __post_init__(self):
        count("num_tasks", self.num_tasks, MAX_TASKS)

    def tensors(self, config, D_in, D_out):
        small = functools.partial(nn.init.uniform_, a=-1e-3, b=1e-3)
        return {"router_table": TensorSpec((self.num_tasks, config.num_experts), small)}

    def per_sample(self, x, tensors, batch):
        tasks = batch.sample_tasks(x)
        return None if tasks is None else self.of(tasks, tensors, batch)

    def route(self, x, tensors, batch):
        return self.of(batch.tasks(x), tensors, batch)

    def of(self, tasks: torch.Tensor, tensors, batch) -> Routing:
        """The routing for tasks (T,), -1 for none."""
        logits = tensors["router_table"][tasks.clamp(min=0)]  # (T, E)
        noisy = logits + logistic_noise(logits) if batch.training else logits
        decided = _decide(noisy, batch.config)
        if batch.training and batch.config.has_aux_loss:
            clean = _decide(logits, batch.config)
            decided = decided._replace(logits=logits, mean_prob=clean.mean_prob, lse=clean.lse)
        return without(decided, tasks < 0)


def _decide(logits, config):
    return Routing.from_logits(logits, config.top_k, gate="sigmoid", renormalize=True)


def logistic_noise(like: torch.Tensor) -> torch.Tensor:
    """log u - log(1 - u), with u uniform, in the shape and dtype of `like`."""
    eps = torch.finfo(like.dtype).eps
    u = torch.rand_like(like).clamp(eps, 1 - eps)
    return u.log() - torch.log1p(-u)
