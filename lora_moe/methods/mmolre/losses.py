"""Task losses: mae, mse, multiclass, multilabel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .config import MMoLREConfig


def task_losses(
    config: MMoLREConfig, outputs: Mapping[str, torch.Tensor], labels: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """{task: mean loss}, unweighted; missing labels are excluded.

    Args:
        outputs: the model's outputs.
        labels: {task: tensor}: (B,) or (B, outputs) numbers, NaN if missing, for a regression; (B,)
            class ids, -100 if missing; (B, outputs) of 0 and 1, NaN if missing, for multilabel.
    """
    return {
        name: _loss(name, task.loss, outputs[name], labels[name])
        for name, task in config.tasks.items()
    }


def total_loss(config, outputs, labels) -> torch.Tensor:
    """sum over tasks of weight * loss; see task_losses."""
    losses = task_losses(config, outputs, labels)
    return sum(task.weight * losses[name] for name, task in config.tasks.items())


def _loss(name, kind, out, label):
    one = kind in ("mae", "mse") and label.dim() == 1
    shape = out.shape[:1] if kind == "multiclass" else out.shape
    label = label[:, None] if one else label
    if label.shape != shape:
        raise ValueError(f"labels[{name!r}]: expected {tuple(shape)}, got {tuple(label.shape)}")
    if kind == "multiclass":
        total = nn.functional.cross_entropy(out, label, reduction="sum", ignore_index=-100)
        return total / (label != -100).sum().clamp(min=1)
    there = ~label.isnan()
    label = torch.where(there, label, 0).to(out.dtype)
    each = {
        "mae": nn.functional.l1_loss,
        "mse": nn.functional.mse_loss,
        "multilabel": nn.functional.binary_cross_entropy_with_logits,
    }[kind](out, label, reduction="none")
    return torch.where(there, each, 0).sum() / there.sum().clamp(min=1)
