"""UniTSE: the shared and task experts of one block, with one router per task.

Letters: B items, L positions, D width, N shared experts, E experts of all tasks together, R rank rows
of all experts, S streams: 1 if all tasks read the same input, or one per task.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ... import functional as F
from ...components import ROUTER_STD
from ...fields import expect
from .checks import expect_mask
from .config import ACTIVATIONS, expect_options


class UniTSE(nn.Module):
    """Shared and task-specific low-rank experts, mixed by one router per task.

        H^t = sum_n g^t_n f_n(X^t) + g^t_{N+1} f_t(X^t),    g^t = softmax(W^t x_i)
        f_n(X)_i = B_n phi(A_n [x_{i-1}; x_i; x_{i+1}] + b1_n) + b2_n

    Parameters: lora_A (3, R, D), one slice per tap: x_{i-1}, x_i, x_{i+1}; bias_A (R,); lora_B (R, D),
        whose row i pairs with row i of lora_A; bias_B (E, D); router_weight (tasks * K, D), with K experts
        available to each task.  Rows and experts are ordered: shared, then one per task.
        Without a W0, B is not initialized to zero: A and B are drawn so that the mean of K experts, with a
        ReLU, has the variance of their input; biases are initially zero, routers near zero.
        The attribute gates (tasks, B, L, E) has the last forward's gates, detached; initially None.

    Args:
        width: D.
        shared_ranks: ranks of the N shared experts.
        task_ranks: rank of each task's expert, one per task; all zero for no task experts.
        activation, route, residual: as in MMoLREConfig.
    """

    def __init__(
        self,
        width: int,
        shared_ranks: tuple[int, ...],
        task_ranks: tuple[int, ...],
        *,
        activation: str = "relu",
        route: str = "token",
        residual: bool = False,
    ):
        super().__init__()
        mixed = any(task_ranks) and not all(task_ranks)
        fit = len(task_ranks) and not mixed
        expect(fit, "task_ranks", "one per task, all or none 0", task_ranks)
        expect_options(activation, route)
        self.width, self.tasks, self.shared = width, len(task_ranks), len(shared_ranks)
        self.activation, self.route, self.residual = activation, route, residual
        self.ranks = (*shared_ranks, *(r for r in task_ranks if r))
        self.choices = self.shared + bool(task_ranks[0])  # K
        R, E = sum(self.ranks), len(self.ranks)
        self.lora_A = nn.Parameter(torch.empty(3, R, width))
        self.bias_A = nn.Parameter(torch.empty(R))
        self.lora_B = nn.Parameter(torch.empty(R, width))
        self.bias_B = nn.Parameter(torch.empty(E, width))
        self.router_weight = nn.Parameter(torch.empty(self.tasks * self.choices, width))
        self.register_buffer("expert_of_row", self._expert_of_row(), persistent=False)  # (R,)
        self.gates: torch.Tensor | None = None
        self.reset_parameters()

    def _expert_of_row(self):
        experts = torch.arange(len(self.ranks))
        return experts.repeat_interleave(torch.tensor(self.ranks), output_size=sum(self.ranks))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial values (see the class)."""
        if self.lora_A.is_meta:
            return
        self.lora_A.uniform_(-1, 1).mul_(math.sqrt(2 / self.width))
        self.bias_A.zero_()
        for rows in self.lora_B.split(self.ranks):
            rows.uniform_(-1, 1).mul_(math.sqrt(3 * self.choices / len(rows)))
        self.bias_B.zero_()
        self.router_weight.normal_(std=ROUTER_STD)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """H of each task.

        Args:
            x: (B, L, D), the same for all tasks, or (tasks, B, L, D).
            mask: (B, L) bool, False at padding, which is zeroed in input and output; None: no padding.
        Returns:
            (tasks, B, L, D) in x's dtype.
        Raises:
            ValueError: if a shape is wrong.
        """
        x = self._streams(x, mask)  # (S, B, L, D)
        taps, logits = F.shrink(x, self.lora_A.flatten(0, 1), self.router_weight)
        s = conv3(taps.view(*x.shape[:-1], *self.lora_A.shape[:2]))  # (S, B, L, R)
        logits = logits.view(*x.shape[:-1], self.tasks, self.choices)
        gates = self._gates(logits, mask)  # (tasks, B, L, E)
        phi = ACTIVATIONS[self.activation](s + self.bias_A.to(s.dtype))
        h = phi * gates[..., self.expert_of_row]  # (tasks, B, L, R)
        base = x.expand(self.tasks, -1, -1, -1).contiguous() if self.residual else None
        rows = torch.cat([self.lora_B, self.bias_B]).to(x.dtype)  # (R + E, D)
        y = F.expand(torch.cat([h, gates], -1).flatten(0, -2), rows, base)
        y = y.view(self.tasks, *x.shape[1:])
        return y if mask is None else y.masked_fill(~mask[..., None], 0)

    def _streams(self, x, mask):
        expected = f"(B, L, {self.width}) or ({self.tasks}, B, L, {self.width})"
        fits = x.dim() in (3, 4) and x.shape[-1] == self.width
        fits = fits and (x.dim() == 3 or x.shape[0] == self.tasks)
        if not fits:
            raise ValueError(f"x: expected {expected}, got {tuple(x.shape)}")
        x = x if x.dim() == 4 else x[None]
        if mask is None:
            return x
        expect_mask("mask", mask, x.shape[1:3])
        return x.masked_fill(~mask[..., None], 0)

    def _gates(self, logits, mask):
        """(S, B, L, tasks, K) -> (tasks, B, L, E): each task's softmax, zero for the others' experts."""
        logits = logits.expand(self.tasks, -1, -1, -1, -1).diagonal(dim1=0, dim2=3).movedim(-1, 0)
        if self.route == "mean":
            logits = masked_mean(logits, mask)[:, :, None].expand_as(logits)
        gates = logits.softmax(-1)  # (tasks, B, L, K)
        if self.choices > self.shared:
            own = torch.eye(self.tasks, dtype=gates.dtype, device=gates.device)[:, None, None]
            gates = torch.cat([gates[..., : self.shared], gates[..., self.shared :] * own], -1)
        self.gates = gates.detach()
        return gates

    def extra_repr(self) -> str:
        return (
            f"width={self.width}, ranks={self.ranks}, shared={self.shared}, tasks={self.tasks},"
            f" activation={self.activation}, route={self.route}, residual={self.residual}"
        )


def conv3(taps: torch.Tensor) -> torch.Tensor:
    """(..., L, 3, R) -> (..., L, R):  s_i = taps_{i-1, 0} + taps_{i, 1} + taps_{i+1, 2}, zero outside."""
    taps = nn.functional.pad(taps, (0, 0, 0, 0, 1, 1))
    return taps[..., :-2, 0, :] + taps[..., 1:-1, 1, :] + taps[..., 2:, 2, :]


def masked_mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(S, B, L, K) -> (S, B, K), the mean over L where the mask (B, L) is True."""
    if mask is None:
        return x.mean(2)
    mask = mask[..., None].to(x.dtype)  # (B, L, 1)
    return (x * mask).sum(2) / mask.sum(1).clamp(min=1)
