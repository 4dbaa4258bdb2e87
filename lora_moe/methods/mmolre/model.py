"""MMoLRE: a stack of blocks per modality, and a fusion and a head per task.

Letters: B items, L positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .block import UniTSE
from .checks import expect_mask
from .config import MMoLREConfig


class Fusion(nn.Module):
    """Task-adaptive fusion: attention per task over positions, then over modalities.

        z_m = sum_i softmax_i(q_m . h_mi) h_mi        a = softmax_m(u . tanh(V z_m))        z = sum_m a_m z_m

    A modality whose mask is all False for an item is excluded; an item without any modality is zero.
    """

    def __init__(self, width: int, modalities: int):
        super().__init__()
        self.position_query = nn.Parameter(torch.zeros(modalities, width))
        self.project = nn.Linear(width, width)
        self.modality_query = nn.Linear(width, 1, bias=False)

    def forward(self, sequences, masks):
        """sequences: M of (B, L_m, D); masks: M of (B, L_m) bool or None.  -> (B, D)"""
        pooled, present = [], []
        for query, h, mask in zip(self.position_query, sequences, masks, strict=True):
            mask = h.new_ones(h.shape[:2], dtype=torch.bool) if mask is None else mask
            pooled.append(attend(h @ query.to(h.dtype), h, mask))
            present.append(mask.any(1))
        z, present = torch.stack(pooled, 1), torch.stack(present, 1)  # (B, M, D), (B, M)
        scores = self.modality_query(torch.tanh(self.project(z)))[..., 0]
        return attend(scores, z, present)


class MMoLRE(nn.Module):
    """Maps two or more feature sequences to one prediction per task.

    Each modality is projected to D and passes through its own stack of UniTSE blocks.  Tasks share the
    input of the first block and have separate outputs, which later blocks process with shared experts.
    Then each task fuses the modalities and applies its head.
    """

    def __init__(self, config: MMoLREConfig):
        super().__init__()
        self.config = config
        D, tasks = config.width, 1 if config.hard_sharing else len(config.tasks)
        options = {name: getattr(config, name) for name in ("activation", "route", "residual")}
        ranks = config.shared_ranks, (config.task_rank,) * tasks
        self.project = nn.ModuleDict(
            {
                name: nn.Identity() if features == D else nn.Linear(features, D)
                for name, features in config.modalities.items()
            }
        )
        self.encoders = nn.ModuleDict(
            {
                name: nn.ModuleList(UniTSE(D, *ranks, **options) for _ in range(config.blocks))
                for name in config.modalities
            }
        )
        self.fusion = nn.ModuleDict(
            {name: Fusion(D, len(config.modalities)) for name in config.tasks}
        )
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Dropout(config.dropout),
                    nn.Linear(D, D),
                    nn.ReLU(),
                    nn.Linear(D, task.outputs),
                )
                for name, task in config.tasks.items()
            }
        )

    def forward(
        self, features: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """{task: (B, outputs)}: scores for regression, logits for classification.

        Args:
            features: {modality: (B, L, features)}; lengths may differ between modalities.
            masks: {modality: (B, L) bool}, False at padding; an omitted modality has no padding.
        Raises:
            ValueError: if a modality is missing or unknown, or a shape is wrong.
        """
        masks = masks or {}
        self._check(features, masks)
        encoded = {}
        for name, blocks in self.encoders.items():
            mask, x = masks.get(name), features[name]
            if mask is not None:  # before the projection, where NaN would reach a gradient
                x = x.masked_fill(~mask[..., None], 0)
            h = self.project[name](x)
            for block in blocks:
                h = block(h, mask)
            encoded[name] = h  # (tasks or 1, B, L, D)
        masks = [masks.get(name) for name in encoded]
        outputs = {}
        for t, (task, head) in enumerate(self.heads.items()):
            stream = 0 if self.config.hard_sharing else t
            outputs[task] = head(self.fusion[task]([h[stream] for h in encoded.values()], masks))
        return outputs

    def _check(self, features, masks):
        known = self.config.modalities
        if features.keys() != known.keys() or not masks.keys() <= known.keys():
            got = f"features {sorted(features)}, masks {sorted(masks)}"
            raise ValueError(f"features: expected the modalities {sorted(known)}, got {got}")
        batch = next(iter(features.values())).shape[0]
        for name, x in features.items():
            if x.dim() != 3 or x.shape[0] != batch or x.shape[2] != known[name]:
                raise ValueError(
                    f"features[{name!r}]: expected ({batch}, L, {known[name]}), got {tuple(x.shape)}"
                )
            if masks.get(name) is not None:
                expect_mask(f"masks[{name!r}]", masks[name], x.shape[:2])


def attend(scores: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sum_i softmax_i(scores) values_i where the mask is True; zero if it never is.

    scores, mask (B, L), values (B, L, D) -> (B, D)
    """
    weights = scores.masked_fill(~mask, -torch.inf).softmax(1)
    weights = weights.masked_fill(~mask, 0)  # an empty row's softmax is NaN
    return (weights[:, None] @ values)[:, 0]
