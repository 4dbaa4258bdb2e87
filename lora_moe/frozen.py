"""Keeps the rows of frozen experts unchanged by gradients, momentum and weight decay.

Their gradient is zero, but AdamW still applies weight decay and remaining momentum.  So they are restored
after every optimizer step, for any optimizer, by global optimizer hooks.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .sharded import is_stepped_by_zero

_layers: weakref.WeakSet = weakref.WeakSet()  # with frozen experts
_kept: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # optimizer -> [(rows, values)]
_hooks: list = []


def keep_rows(layer: nn.Module) -> None:
    """Start keeping the rows of layer.frozen unchanged, or stop if layer.frozen is empty."""
    if not layer.frozen:
        _layers.discard(layer)
        return
    _layers.add(layer)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


@torch.no_grad()
def _before_step(optimizer, _args, _kwargs):
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    own, kept = {id(p) for p in stepped}, []
    for layer in list(_layers):
        for parameter in itertools.chain(*layer.pairs()):
            if is_stepped_by_zero(parameter):
                _refuse_zero(parameter, optimizer, stepped)
            elif id(parameter) in own:
                kept += [(rows, rows.clone()) for rows in frozen_rows(layer, parameter)]
    # a stack, because a step may call the step of its base class
    _kept.setdefault(optimizer, []).append(kept)


@torch.no_grad()
def _after_step(optimizer, _args, _kwargs):
    for rows, values in _kept[optimizer].pop():
        rows.copy_(values)


def _refuse_zero(parameter, optimizer, stepped):
    """Raise RuntimeError if the optimizer steps a flat copy of the parameter."""
    if hasattr(parameter, "_z3_optimizer"):
        found = parameter._z3_optimizer.optimizer is optimizer
    else:  # a process without a part of the copy steps none of it
        part = getattr(parameter._hp_mapping, "hp_fragment", None)
        found = part is not None and any(_memory(p) == _memory(part) for p in stepped)
    if found:
        raise RuntimeError(
            "freeze_experts: DeepSpeed's ZeRO steps a flat copy of the parameters, so single rows cannot"
            " be frozen: train with DDP or FSDP2, or unfreeze with freeze_experts(model, None)"
        )


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()


def frozen_rows(layer: nn.Module, parameter: torch.Tensor) -> list[torch.Tensor]:
    """Views of the rows of lora_A or lora_B that belong to frozen experts; none for a shared A.

    For a sharded parameter, the rows on this process.
    """
    if layer.config.shared_a and any(parameter is A for A, _ in layer.pairs()):
        return []
    first, part = _local_rows(parameter.detach(), layer.offsets[-1])
    ranges = []
    for e in layer.frozen:
        begin, end = (layer.offsets[i] - first for i in (e, e + 1))
        begin, end = max(begin, 0), min(end, part.shape[0])
        if ranges and ranges[-1][1] == begin:  # the next expert's rows follow
            begin = ranges.pop()[0]
        if begin < end:
            ranges.append((begin, end))
    return [part[begin:end] for begin, end in ranges]


def _local_rows(parameter, rows):
    """(index of the first row on this process, the rows on this process)"""
    first, part = 0, parameter
    if hasattr(parameter, "device_mesh"):
        part, mesh = parameter.to_local(), parameter.device_mesh
        for dim, placement in enumerate(parameter.placements):
            if placement.is_shard(0):  # as torch.chunk divides them
                size = -(-rows // mesh.size(dim))
                begin = min(mesh.get_local_rank(dim) * size, rows)
                first, rows = first + begin, min(size, rows - begin)
    if part.dim() != 2 or part.shape[0] != rows:
        raise RuntimeError(
            f"freeze_experts: expected {rows} rows of lora_A or lora_B on this process, got a shard"
            f" {tuple(part.shape)}, whose rows cannot be frozen: train with DDP or FSDP2 (not FSDP1), or"
            " unfreeze with freeze_experts(model, None)"
        )
    return first, part
