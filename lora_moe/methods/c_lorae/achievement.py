"""AchievementLoss: the achievement-based multi-task loss, and two related losses.

    a_t <- (1 - momentum) a_t + momentum metric_t        at each evaluation; the first value is taken as is
    p_t  = single_task_metric_t * (1 + margin)           a single-task model's metric plus a margin
    w_t  = max(0, 1 - a_t / p_t)^gamma                   "achievement": 0 once the task is solved
    w_t  = -(1 - a_t)^gamma log a_t                      "dtp", dynamic task prioritization
    w_t  = (1 - a_t)^gamma                               "focal"

    weights  w <- softmax(w)  or  w / sum(w)
    loss     prod_t L_t^w_t   (geometric)   or   sum_t w_t L_t

Sources: Yun and Cho, Achievement-Based Training Progress Balancing for Multi-Task Learning, ICCV 2023, for
which "achievement" is exact; it is inferred that C-LoRAE's loss of the same name is this one.  Guo et al.,
Dynamic Task Prioritization for Multitask Learning, ECCV 2018.  "dtp" and "focal" differ from the published
versions: dynamic task prioritization has gamma 1 by default and does not normalize, and focal weights are
divided by their sum; here both have gamma 2 and the softmax by default, like "achievement".
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

FORMS = ("geometric", "sum")
NORMALIZATIONS = ("softmax", "sum")
WEIGHTINGS = ("achievement", "dtp", "focal")
TINY = 1e-8


class AchievementLoss(nn.Module):
    """Combines the losses of several tasks, weighted by how far each is from its achievable metric.

    The raw weight of a solved task is zero.  With normalization="sum" its weight is zero too; with the
    softmax, the published default, no task's weight falls below 1 / (1 + e (N - 1)).  If all raw weights are
    zero, and before the first update, all weights are equal.

    Args:
        potentials: {task: metric of a model trained on this task alone}, in (0, 1] or in any unit that
            the metrics share, higher is better.  "dtp" and "focal" only use the names.
        margin: relative margin above these metrics.
        gamma: at least 0.
        momentum: weight of the newest metric in the moving average, in (0, 1].
        form: "geometric" or "sum".
        normalization: "softmax" or "sum".
        weighting: "achievement", "dtp" or "focal".
    Raises:
        ValueError: if an argument is invalid.
    """

    def __init__(
        self,
        potentials: Mapping[str, float],
        *,
        margin: float = 0.05,
        gamma: float = 2.0,
        momentum: float = 0.1,
        form: str = "geometric",
        normalization: str = "softmax",
        weighting: str = "achievement",
    ):
        super().__init__()
        for name, value, allowed in (
            ("form", form, FORMS),
            ("normalization", normalization, NORMALIZATIONS),
            ("weighting", weighting, WEIGHTINGS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
        if not potentials:
            raise ValueError("potentials: expected a metric for each task, got none")
        bad = {t: p for t, p in potentials.items() if not (math.isfinite(p) and p > 0)}
        if bad:
            raise ValueError(f"potentials: expected finite positive metrics, got {bad}")
        if not (math.isfinite(margin) and margin > -1 and math.isfinite(gamma) and gamma >= 0):
            raise ValueError(f"margin, gamma: expected > -1 and >= 0, got {margin!r} and {gamma!r}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum: expected a number in (0, 1], got {momentum!r}")
        self.tasks = tuple(potentials)
        self.gamma, self.momentum = gamma, momentum
        self.form, self.normalization, self.weighting = form, normalization, weighting
        single = torch.tensor([float(p) for p in potentials.values()])
        self.register_buffer("potential", single * (1 + margin))  # (N,)
        self.register_buffer("achieved", torch.full_like(single, torch.nan))  # (N,), NaN at first

    @torch.no_grad()
    def update(self, metrics: Mapping[str, float]) -> None:
        """Record an evaluation: one metric per task.

        Raises:
            ValueError: if a task is missing or unknown, or a metric is not finite, negative, or above 1
                although the weighting needs a fraction.  Nothing changes then.
        """
        if set(metrics) != set(self.tasks):
            raise ValueError(
                f"metrics: expected one for each of {self.tasks}, got {sorted(metrics)}"
            )
        high = math.inf if self.weighting == "achievement" else 1.0
        bad = {t: m for t, m in metrics.items() if not (math.isfinite(float(m)) and 0 <= m <= high)}
        if bad:
            raise ValueError(f"metrics: expected finite numbers in [0, {high:g}], got {bad}")
        new = self.achieved.new_tensor([float(metrics[task]) for task in self.tasks])
        moved = torch.lerp(self.achieved, new, self.momentum)
        self.achieved.copy_(torch.where(self.achieved.isnan(), new, moved))

    def raw_weights(self) -> torch.Tensor:
        """w (N,) before normalization; NaN before the first update."""
        if self.weighting == "achievement":
            return (1 - self.achieved / self.potential).clamp(min=0) ** self.gamma
        left = (1 - self.achieved) ** self.gamma
        return left if self.weighting == "focal" else -left * self.achieved.clamp(min=TINY).log()

    def weights(self) -> torch.Tensor:
        """(N,), summing to one."""
        raw = self.raw_weights()
        raw = torch.where(raw.isnan(), 0.0, raw)
        if self.normalization == "softmax":
            return torch.softmax(raw, 0)
        return _shares(raw)

    def forward(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The combined loss of the tasks, differentiable.

        Omit tasks that are not in the batch: the weights of the others are divided by their sum, so the
        scale of the loss does not depend on the batch's tasks.

        Args:
            losses: {task: 0-dim loss} of the tasks in the batch; positive for the geometric form.
        Raises:
            ValueError: if a task is unknown, or there is none.
        """
        unknown = sorted(set(losses) - set(self.tasks))
        if unknown or not losses:
            raise ValueError(
                f"losses: expected one for each of the batch's tasks among {self.tasks}, got"
                f" {unknown or 'none'}"
            )
        present = [task in losses for task in self.tasks]
        stacked = torch.stack([losses[task] for task in self.tasks if task in losses])
        weights = _shares(self.weights()[torch.tensor(present)]).to(stacked)
        if self.form == "sum":
            return (weights * stacked).sum()
        return torch.exp((weights * stacked.clamp(min=TINY).log()).sum())

    def extra_repr(self) -> str:
        return (
            f"tasks={self.tasks}, gamma={self.gamma:g}, momentum={self.momentum:g}, form={self.form},"
            f" normalization={self.normalization}, weighting={self.weighting}"
        )


def _shares(weights):
    """The weights divided by their sum; equal if all are zero."""
    total = weights.sum()
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1), 1 / len(weights))
