"""UnpairedMiddle: rank-1 factors whose A and B are picked separately (conditional MixLoRA)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from .. import functional as F
from ..components import register
from ..middle import Middle
from ..rows import adapter_rows


@register
@dataclasses.dataclass(frozen=True)
class UnpairedMiddle(Middle):
    """y = base + sum_{j < K} g_j h_j s b_{l_j} a_{i_j} x:  slots j < K are rows of A, slots K + j rows of B.

    The routing has 2 K slots, as from FactorRouter: ids i and weights g, then ids l and weights h.
    Every expert has rank 1.

    Source: Shen et al. 2024, arXiv 2402.15896.
    """

    kind: ClassVar[str] = "unpaired"

    def tensors(self, config, D_in, D_out):
        if set(config.ranks) != {1} or config.shared_a:
            raise ValueError(f"r: expected rank 1 without shared_a, got {config.r}")
        return {}

    def mix(self, x, base, routing, tensors, batch):
        layer, (A, B) = batch.layer, adapter_rows(batch.layer)
        slots = routing.indices.shape[1]
        if slots % 2:
            raise ValueError(f"routing: expected 2 K slots, K of A and K of B, got {slots}")
        S, _ = F.shrink(x, A)  # (T, E)
        of_a, of_b = routing.indices.long().chunk(2, 1)  # (T, K) each
        g, h = routing.weights.to(S).chunk(2, 1)
        taken = (of_a >= 0) & (of_b >= 0)
        of_a, of_b = of_a.clamp(min=0), of_b.clamp(min=0)
        picked = torch.where(taken, S.gather(1, of_a) * g * h * layer.scaling.to(S)[of_b], 0)
        return F.expand(torch.zeros_like(S).scatter_add(1, of_b, picked), B, base)
