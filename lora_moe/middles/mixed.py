"""MixedMiddle: one LoRA from the mixed A and the mixed B (Polytropon)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from .. import functional as F
from ..components import register
from ..middle import Middle
from ..per_sample import add_mixed, pays
from ..rows import adapter_rows, dense_gates


@register
@dataclasses.dataclass(frozen=True)
class MixedMiddle(Middle):
    """y = base + (sum_e g_e s_e B_e) (sum_e g_e A_e) x:  the gates mix the matrices, not their products.

    All experts have the same rank and separate A.  The output for a token without experts equals base.

    Source: Ponti et al. 2023 (Polytropon), arXiv 2202.13914.
    """

    kind: ClassVar[str] = "mixed"

    def tensors(self, config, D_in, D_out):
        if len(set(config.ranks)) != 1 or config.shared_a:
            raise ValueError(
                f"r: expected one rank for all experts, without shared_a, got {config.r!r:.99}"
            )
        return {}

    def mix(self, x, base, routing, tensors, batch):
        layer, samples = batch.layer, batch.samples
        if pays(layer, x, samples):
            return add_mixed(layer, x, base, samples)
        A, B = adapter_rows(layer)
        S, _ = F.shrink(x, A)  # (T, R)
        E = batch.config.num_experts
        gates = dense_gates(routing, E).to(S)  # (T, E)
        mixed = (gates[:, :, None] * S.unflatten(1, (E, -1))).sum(1)  # (T, r)
        scaled = gates * layer.scaling.to(S)
        return F.expand((scaled[:, :, None] * mixed[:, None]).flatten(1), B, base)
