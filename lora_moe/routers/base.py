"""Router: the base class of routers; docs/routers.md shows how to write one."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from ..components import Batch, Component
from ..routing import Routing

if TYPE_CHECKING:
    from ..config import LoraMoeConfig

# fields of LoraMoeConfig that configure the token router, with their defaults
TOKEN_FIELDS = {
    "gate": "softmax",
    "renormalize": None,
    "temperature": 1.0,
    "top_p": None,
    "threshold": None,
    "router_bias": False,
    "selection_bias": False,
}


class Router(Component):
    """x -> Routing: a frozen dataclass for LoraMoeConfig(router=).

    Attributes:
        config_fields: the fields of TOKEN_FIELDS that it reads; a configuration that sets any other raises.
    """

    known: ClassVar[dict] = {}
    config_fields: ClassVar[tuple[str, ...]] = ()

    def fields_read(self) -> tuple[str, ...]:
        return self.config_fields

    def __init_subclass__(cls, **kwargs):
        """A subclass that overrides only `route` routes per token, even if its base class does not."""
        super().__init_subclass__(**kwargs)
        if "route" in vars(cls) and "per_sample" not in vars(cls):
            cls.per_sample = Router.per_sample  # type: ignore[method-assign]

    def per_sample(
        self, x: torch.Tensor, tensors: dict[str, torch.Tensor], batch: Batch
    ) -> Routing | None:
        """The routing with one row per sample of x (B, L, D_in) if all L tokens share it, else None.

        A layer then does not call `route`, and may mix the experts once per sample.
        """
        return None

    def route(self, x: torch.Tensor, tensors: dict[str, torch.Tensor], batch: Batch) -> Routing:
        """The routing of each token of x.

        Args:
            x: (..., D_in), before dropout.
            tensors: the tensors that `tensors` declares, by name.
            batch: the layer, tasks and padding.
        Returns:
            Routing with T rows; aux_loss and statistics need its logits, lse and mean_prob.
        """
        raise NotImplementedError


def decide(logits: torch.Tensor, config: LoraMoeConfig, bias=None) -> Routing:
    """Routing.from_logits with the configuration's fields, including temperature.  logits (..., E)"""
    logits = logits if config.temperature == 1 else logits / config.temperature
    return Routing.from_logits(
        logits, config.top_k, gate=config.gate, renormalize=config.normalizes, bias=bias,
        top_p=config.top_p, threshold=config.threshold,
    )  # fmt: skip
