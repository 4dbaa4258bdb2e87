"""Banks: this rank's part of the experts of one linear layer, as buffers of the layer.

Letters: E experts, R rank rows of all experts together, D_in and D_out the whole linear's sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..config import LoraMoeConfig
from ..reference import expert_of_row
from ..routers import ThresholdRouter
from ..routers.token import tempered
from . import ops  # noqa: F401  defines the operators
from .rules import alike, rule_of, to_text
from .shards import Shard

_ops = torch.ops.lora_moe_serving
# in the operators' argument order
NAMES = ("w", "a", "b", "scaling", "experts", "bias", "router_bias")
PREFIX = "lora_moe_"


class Projection(NamedTuple):
    """An adapter's full tensors for one projection of a layer, with the names in LoraMoeLinear."""

    index: int | None  # in the layer; None for one bank over all of its outputs
    config: LoraMoeConfig
    tensors: dict[str, torch.Tensor]


class Banks:
    """The banks of one layer: registers their buffers and calls them.

    They are buffers, not parameters, so the base's weight loader ignores them.  The router and the scales are
    fp32; lora_A and lora_B have the base's dtype.

    Args:
        layer: the layer that gets the buffers.
        shard: this rank's part of the layer.
        projections: the projections with experts; indices are unique.
        dtype: dtype of the base.
        device: device of the base.
    """

    def __init__(
        self,
        layer: nn.Module,
        shard: Shard,
        projections: list[Projection],
        dtype: torch.dtype,
        device: torch.device,
    ):
        projections = sorted(projections, key=lambda p: -1 if p.index is None else p.index)
        self.shard, self.count = shard, len(projections)
        rules = [rule_of(p.config, *shard.outputs(p.index)) for p in projections]
        self.rules = to_text(tuple(rules))
        buffers = [_buffers(shard, projection, dtype) for projection in projections]
        buffers = [{k: None if t is None else t.to(device) for k, t in b.items()} for b in buffers]
        if len(rules) > 1 and alike(tuple(rules)):
            buffers = _side_by_side(buffers)
        else:
            buffers = [
                {k: t if t is None else t.contiguous() for k, t in b.items()} for b in buffers
            ]
        for i, named in enumerate(buffers):
            for name, tensor in named.items():
                layer.register_buffer(f"{PREFIX}{i}_{name}", tensor, persistent=False)

    def add(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """y plus the experts.  (..., D_in of this rank), (..., D_out of this rank)

        In a row-parallel layer, the result is this rank's part of a sum that the layer computes.

        Args:
            all_reduce: sums over the ranks; used if shard.sums_logits.
        """
        shape = y.shape
        x = x.to(y.dtype).reshape(-1, x.shape[-1])
        y = y.reshape(-1, shape[-1])
        if self.shard.sums_logits:
            w, a, *rest = self._tensors(layer, 0)
            s, logits = _ops.shrink(x, w, a)
            y = _ops.add_gated(s, all_reduce(logits), y, *rest, self.rules)
        else:
            banks = [self._tensors(layer, i) for i in range(self.count)]
            y = _ops.add_experts(x, y, *map(list, zip(*banks, strict=True)), self.rules)
        return y.reshape(shape)

    def _tensors(self, layer, i):
        return [getattr(layer, f"{PREFIX}{i}_{name}") for name in NAMES]


def _side_by_side(buffers):
    """Move the banks to adjacent memory (B along its columns), so that one launch reads them all."""
    joined = [dict(named) for named in buffers]
    for name in NAMES:
        tensors = [named[name] for named in buffers]
        if any(t is None for t in tensors):
            continue
        dim = 1 if name == "b" else 0
        whole = torch.cat(tensors, dim)
        for named, part in zip(
            joined, whole.split([t.shape[dim] for t in tensors], dim), strict=True
        ):
            named[name] = part
    return joined


def _buffers(shard, projection, dtype) -> dict[str, torch.Tensor | None]:
    config, tensors = projection.config, projection.tensors
    E = config.num_experts
    weight, bias = tempered(config, tensors["router_weight"].float(), tensors.get("router_bias"))
    if isinstance(config.router, ThresholdRouter):  # its logit comes after the experts'
        weight = torch.cat([weight, tensors["threshold_weight"].float()])
        bias = torch.cat([torch.zeros(E), tensors["threshold_bias"].float()])
    w, a, b = shard.cut(projection.index, weight, tensors["lora_A"], tensors["lora_B"])
    offsets = rule_of(config, 0, 0).offsets
    selection = tensors.get("selection_bias")
    values = (
        w,
        a.to(dtype),
        b.to(dtype),
        torch.tensor(config.scales, dtype=torch.float32),
        expert_of_row(offsets),
        None if selection is None else selection.float(),
        None if bias is None else bias.float(),
    )
    return dict(zip(NAMES, values, strict=True))
