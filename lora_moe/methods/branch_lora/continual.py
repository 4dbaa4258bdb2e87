"""Continual learning: TaskSelector, which finds an input's task, and metrics of forgetting.

Letters: N tasks, B samples, d the width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import normalize


class TaskSelector(nn.Module):
    """One text key and one image key per task; selects the task with the nearest keys by cosine.

        L = lambda * sum over samples of  (1 - cos(e_img, k_img)) + (1 - cos(e_txt, k_txt))

    Embeddings come from fixed encoders, so the minimizer of L is known: the direction of the sum of the
    unit embeddings.  Keys are these sums: exact after every batch, in any order and without a learning
    rate; gradient descent on L converges to the same (see loss).

    Source: BranchLoRA (arXiv 2506.02041), its task selector.

    Args:
        text_dim: width of text embeddings.
        image_dim: width of image embeddings; None for text only.
    """

    def __init__(self, text_dim: int, image_dim: int | None = None):
        super().__init__()
        self.register_buffer("text_keys", torch.zeros(0, text_dim))
        self.register_buffer("image_keys", None if image_dim is None else torch.zeros(0, image_dim))

    def begin_task(self) -> int:
        """Add keys, initially zero, and return the task's number."""
        for name, keys in list(self.named_buffers()):
            setattr(self, name, torch.cat([keys, keys.new_zeros(1, keys.shape[1])]))
        return len(self.text_keys) - 1

    @torch.no_grad()
    def observe(self, text: torch.Tensor, image: torch.Tensor | None = None) -> None:
        """Update the newest task's keys with a batch of embeddings (B, d)."""
        for keys, embeddings in self._pairs(text, image):
            if not len(keys):
                raise ValueError("selector: expected begin_task first")
            keys[-1] += normalize(embeddings.to(keys), dim=1).sum(0)

    def loss(self, text, image=None, coefficient: float = 1.0) -> torch.Tensor:
        """L of a batch for the newest task, to train encoders or measure a task's spread."""
        terms = [
            (1 - normalize(e, dim=1) @ normalize(keys[-1].to(e), dim=0)).sum()
            for keys, e in self._pairs(text, image)
        ]
        return coefficient * sum(terms)

    def forward(self, text: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        """(B,) the nearest task of each sample by the sum of cosines; for set_task."""
        if not len(self.text_keys):
            raise ValueError("selector: expected a task; see begin_task")
        cosines = [
            normalize(e.to(keys), dim=1) @ normalize(keys, dim=1).T
            for keys, e in self._pairs(text, image)
        ]
        return sum(cosines).argmax(1)

    def _pairs(self, text, image):
        if image is not None and self.image_keys is None:
            raise ValueError("image: expected None, as the selector was created without image_dim")
        given = [("text", self.text_keys, text), ("image", self.image_keys, image)]
        for name, keys, embeddings in given:
            if embeddings is None:
                continue
            if embeddings.dim() != 2 or embeddings.shape[1] != keys.shape[1]:
                got = tuple(embeddings.shape)
                raise ValueError(f"{name}: expected (B, {keys.shape[1]}), got {got}")
            yield keys, embeddings


class ContinualMetrics(NamedTuple):
    acc: float  # mean accuracy after the last task
    maa: float  # mean over time of the mean accuracy on the tasks so far
    bwt: float  # mean change since a task was learned; below 0 means forgetting


def continual_metrics(accuracy: Sequence[Sequence[float]]) -> ContinualMetrics:
    """ACC, MAA and BWT of A_ij, the accuracy on task j after task i was learned (j <= i).

        ACC = mean_j A_Nj      MAA = mean_i mean_{j <= i} A_ij      BWT = mean_{j < N} (A_Nj - A_jj)

    Args:
        accuracy: N rows; row i has at least A_i0 .. A_ii, and the rest is ignored.
    Raises:
        ValueError: if there are no rows, or one is too short.
    Source: Chen et al. 2024 (CoIN), arXiv 2403.08350.
    """
    rows = [[float(a) for a in row[: i + 1]] for i, row in enumerate(accuracy)]
    if not rows or any(len(row) != i + 1 for i, row in enumerate(rows)):
        raise ValueError(f"accuracy: expected i + 1 numbers in row i, got {rows}")
    last, mean = rows[-1], [sum(row) / len(row) for row in rows]
    change = [last[j] - rows[j][j] for j in range(len(rows) - 1)]
    return ContinualMetrics(mean[-1], sum(mean) / len(mean), sum(change) / max(len(change), 1))
