"""Middle: the base class of modules between lora_A and lora_B that replace the gate.

docs/routers.md shows how to write one.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from .components import Batch, Component
from .routing import Routing


class Middle(Component):
    """(x, routing) -> the experts' sum: a frozen dataclass for LoraMoeConfig(middle=)."""

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
            routing: the router's decision, or the caller's, with T rows.
            tensors: the tensors that `tensors` declares, by name.
            batch: the layer, with lora_A, lora_B, offsets, scaling and frozen; tasks and padding.
        Returns:
            (..., D_out).
        """
        raise NotImplementedError
