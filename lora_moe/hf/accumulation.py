"""Shares: each micro-batch's share of the tokens of an optimizer step.

The auxiliary loss is a mean over tokens.  Weighted by these shares, the losses of micro-batches add up to
the mean over the whole step, for any split, padding and number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def tokens_in(batch) -> torch.Tensor | int | None:
    """Tokens of a micro-batch without padding; samples if it has no tokens; None if unknown."""
    if not isinstance(batch, Mapping):
        return None
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, torch.Tensor) and mask.dim() in (1, 2):
        return mask.count_nonzero()
    if isinstance(ids, torch.Tensor):
        return ids.numel()
    first = next((t for t in batch.values() if isinstance(t, torch.Tensor) and t.dim()), None)
    return None if first is None else first.shape[0]


class Shares:
    """The shares of the current optimizer step.

    Args:
        accelerator: sums over processes.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.total, self.micro_batches = None, 1

    def begin_step(self, batches, over_processes: bool) -> None:
        """Register the micro-batches of a step before the first of them runs.

        over_processes: count the tokens of all processes, as the task loss does.
        """
        counts = [tokens_in(batch) for batch in batches]
        self.micro_batches, self.total = max(len(batches), 1), None
        if not counts or any(count is None for count in counts):
            return
        total = torch.as_tensor(sum(counts), device=self.accelerator.device)
        processes = self.accelerator.num_processes if over_processes else 1
        if processes > 1:  # gradients are averaged over processes
            total = self.accelerator.reduce(total, "sum") / processes
        self.total = total.clamp(min=1)

    def of(self, batch) -> torch.Tensor | float:
        """The share of this micro-batch; a step's shares sum to 1, averaged over processes."""
        tokens = tokens_in(batch)
        if self.total is None or tokens is None:
            return 1 / self.micro_batches
        return torch.as_tensor(tokens, device=self.total.device) / self.total
