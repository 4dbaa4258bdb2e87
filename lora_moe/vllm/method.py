"""LoraMoeMethod: a vLLM linear method that calls the layer's original method, then adds the experts.

vLLM's linear layers, and LoRA layers around them, compute through `quant_method`; wrapping it leaves the
base's loading, quantization and parallelism unchanged.
"""

from __future__ import annotations

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from .bank import Banks
from .shards import Shard


class LoraMoeMethod(LinearMethodBase):
    """base.apply(layer, x, bias) plus the experts of x."""

    def __init__(self, base: LinearMethodBase, banks: Banks):
        self.base, self.banks = base, banks

    def create_weights(self, *args, **kwargs):
        raise RuntimeError("lora_moe: experts can only be attached to a loaded layer")

    def process_weights_after_loading(self, layer):
        self.base.process_weights_after_loading(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = self.base.apply(layer, x, bias)
        return self.banks.add(layer, x, y, tensor_model_parallel_all_reduce)

    def __getattr__(self, name):  # all other attributes are the base method's
        return getattr(self.__dict__["base"], name)


def wrap(layer: LinearBase, banks: Banks) -> None:
    """Make the layer add these experts; their input is the layer's unquantized input."""
    layer.quant_method = LoraMoeMethod(layer.quant_method, banks)
    layer.requires_unquantized_input = True


def shard_of(layer: LinearBase) -> Shard | None:
    """How this layer is sharded, or None if its class is unknown."""
    if (type(layer).forward, type(layer).weight_loader) not in _KNOWN:
        return None
    kind = "replicated"
    rank, ranks = layer.tp_rank, layer.tp_size
    widths, replicas = tuple(layer.output_partition_sizes), ()
    if isinstance(layer, RowParallelLinear):
        kind, widths = "row", (sum(widths),)
    elif isinstance(layer, ColumnParallelLinear):
        kind = "column"
        replicas = replicas_of(layer, len(widths))
        if replicas is None:
            return None
    elif ranks > 1:
        rank, ranks = 0, 1  # replicated on every rank
    return Shard(kind, rank, ranks, layer.input_size, widths, replicas)


def replicas_of(layer: ColumnParallelLinear, projections: int) -> tuple[int, ...] | None:
    """How many ranks have the same part of each projection, or None if that is unknown."""
    shared = getattr(layer, "num_kv_head_replicas", None)
    if shared is None:
        return (1,) * projections
    return (1, shared, shared) if projections == 3 else None


# a subclass with its own forward or weight loader may be sharded differently
_KNOWN = {
    (kind.forward, kind.weight_loader)
    for kind in (
        ReplicatedLinear,
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
}
