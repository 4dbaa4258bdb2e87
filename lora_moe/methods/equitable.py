"""EquitableLoss: EMTL's task weights, which equalize tasks' contributions to the shared parameters.

    c_t = L_t / ||g_t||,  g_t = dL_t / d shared          relative contribution, divided by the tasks' mean
    w   = argmin  sum_t (w_t - 1 / N)^2 + strength * Var_t(w_t / c_t)     with sum_t w_t = 1
    loss  sum_t w_t L_t                                  w gets no gradient

strength 0 gives equal weights; a large one makes w_t proportional to c_t, so that the step w_t ||g_t|| of
each task is the same fraction of its loss.  The weights are positive and have a closed form.

Source: Yuan and Zhang, Equitable Multi-Task Learning, arXiv 2306.09373.  Its abstract defines c and says
that its variance is regularized; the rest of the objective is inferred.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

TINY = 1e-8


class EquitableLoss(nn.Module):
    """The combined loss of the tasks, weighted by their relative contributions.

    Each forward runs an additional backward pass per task, down to the shared parameters.

    Args:
        strength: weight of the variance, at least 0.
    Raises:
        ValueError: if strength is invalid.
    """

    def __init__(self, strength: float = 1.0):
        super().__init__()
        number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
        if not (number and math.isfinite(strength) and strength >= 0):
            raise ValueError(f"strength: expected a number of at least 0, got {strength!r}")
        self.strength = float(strength)

    def forward(
        self, losses: Mapping[str, torch.Tensor], shared: Iterable[nn.Parameter]
    ) -> torch.Tensor:
        """sum_t w_t L_t, differentiable.

        Args:
            losses: {task: 0-dim loss}, positive; the mean over the task's tokens, without padding.
            shared: the parameters that all tasks train; those without requires_grad are ignored.
        Raises:
            ValueError: if there is no loss or no such parameter, or a loss is not 0-dim or has no graph.
        """
        shared = [p for p in shared if p.requires_grad]
        if not losses or not shared:
            raise ValueError(
                f"losses, shared: expected at least one loss and one trainable parameter, got"
                f" {len(losses)} and {len(shared)}"
            )
        for task, loss in losses.items():
            if loss.dim() or not loss.requires_grad:
                raise ValueError(
                    f"losses: expected 0-dim tensors with a graph, got {task}: {tuple(loss.shape)},"
                    f" requires_grad={loss.requires_grad}"
                )
        stacked = torch.stack(list(losses.values()))  # (N,)
        norms = torch.stack([_norm(loss, shared) for loss in losses.values()])  # (N,)
        weights = equitable_weights(stacked.detach(), norms.to(stacked), self.strength)
        return (weights * stacked).sum()

    def extra_repr(self) -> str:
        return f"strength={self.strength:g}"


def equitable_weights(
    losses: torch.Tensor, norms: torch.Tensor, strength: float = 1.0
) -> torch.Tensor:
    """w (N,), positive and summing to one; see the module's docstring.

    The gradient of the objective is zero where  (I + strength / N * D (I - 1 1^T / N) D) w  is the same
    number for every task, D = diag(1 / c).

    Args:
        losses: L (N,), positive.
        norms: ||g|| (N,).
        strength: at least 0.
    """
    N = losses.shape[0]
    contribution = losses.clamp(min=TINY) / norms.clamp(min=TINY)
    d = contribution.mean() / contribution  # (N,), 1 / c
    curvature = torch.diag(1 + strength / N * d.square()) - strength / N**2 * torch.outer(d, d)
    w = torch.linalg.solve(curvature, torch.ones_like(d))
    return w / w.sum()


def _norm(loss, shared):
    grads = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
    squares = [g.detach().double().square().sum() for g in grads if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else loss.new_zeros((), dtype=torch.float64)
