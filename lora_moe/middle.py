"""The base class of middles: what stands between lora_A and lora_B in the place of the gate.

How to write one is in docs/routers.md.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from .components import Batch, Component
from .routing import Routing


class Middle(Component):
    """(x, routing) -> the experts' sum: a frozen dataclass in the place of LoraMoeConfig(middle=)."""

    known: ClassVar[dict] = {}

    def mix(
        self,
        x: torch.Tensor,
        base: torch.Tensor,
        routing: Routing,
        tensors: dict[str, torch.Tensor],
        batch: Batch,
    ) -> torch.Tensor:
        """base + the experts' sum.

        Args:
            x: (..., D_in), after dropout, in base's dtype.
            base: (..., D_out), the base layer's output.
            routing: the router's decision, or the caller's, of T rows.
            tensors: those of `tensors`, by name.
            batch: the layer, with lora_A, lora_B, offsets, scaling and frozen; tasks, padding.
        Returns:
            (..., D_out).
        """
        raise NotImplementedError
