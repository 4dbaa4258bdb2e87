"""TokenRouter: top-k of W x + bias per token, configured by the fields of LoraMoeConfig."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import nn

from .. import functional as F
from ..components import TensorSpec, register
from .base import TOKEN_FIELDS, Router


@register
@dataclasses.dataclass(frozen=True)
class TokenRouter(Router):
    """Routes each token by the top-k of gate((W x + bias) / temperature).

    Used in SequenceRouter(then=); as a layer's router it is the same as router=None.
    """

    kind: ClassVar[str] = "token"
    config_fields: ClassVar[tuple[str, ...]] = tuple(TOKEN_FIELDS)

    def tensors(self, config, D_in, D_out):
        E = config.num_experts
        found = {"router_weight": TensorSpec((E, D_in))}
        if config.router_bias:
            found["router_bias"] = TensorSpec((E,), nn.init.zeros_)
        if config.selection_bias:
            found["selection_bias"] = TensorSpec((E,), nn.init.zeros_, trains=False)
        return found

    def route(self, x, tensors, batch):
        config = batch.config
        weight, bias = tempered(config, tensors["router_weight"], tensors.get("router_bias"))
        return F.router_topk(
            x, weight, config.top_k, gate=config.gate, renormalize=config.normalizes,
            bias=tensors.get("selection_bias"), top_p=config.top_p, threshold=config.threshold,
            router_bias=bias,
        )  # fmt: skip


def tempered(config, weight, bias):
    """Weight and bias of the logits, both divided by the temperature."""
    if config.temperature == 1:
        return weight, bias
    return weight / config.temperature, None if bias is None else bias / config.temperature
