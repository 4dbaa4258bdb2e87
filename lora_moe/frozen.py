"""Rows of frozen experts, which no optimizer moves: neither by gradient, momentum nor weight decay.

Their gradient is zero, but AdamW still decays them and moves them by what momentum is left.  They are put
back after every optimizer step, whatever kind the optimizer is and whenever it was made.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

_layers: weakref.WeakSet = weakref.WeakSet()  # with frozen experts
_kept: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # optimizer -> [(tensor, rows, values)]
_hooks: list = []


def keep_rows(layer: nn.Module) -> None:
    """From now on hold the rows of layer.frozen still, or let go of them where there are none."""
    if not layer.frozen:
        _layers.discard(layer)
        return
    _layers.add(layer)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


@torch.no_grad()
def _before_step(optimizer, _args, _kwargs):
    kept = []
    for layer in list(_layers):
        for parameter in (layer.lora_A, layer.lora_B):
            mask = frozen_rows(layer, parameter)
            if mask is not None:
                tensor, mask = _local(parameter, mask)
                rows = mask.nonzero().flatten()
                kept.append((tensor, rows, tensor[rows]))
    _kept[optimizer] = kept


@torch.no_grad()
def _after_step(optimizer, _args, _kwargs):
    for tensor, rows, values in _kept.pop(optimizer, ()):
        tensor[rows] = values


def frozen_rows(layer: nn.Module, parameter: torch.Tensor) -> torch.Tensor | None:
    """(rows of lora_A or lora_B,) bool, true for those of frozen experts; None for a shared A."""
    if not layer.frozen or (parameter is layer.lora_A and layer.config.shared_a):
        return None
    offsets = layer.offsets
    mask = torch.zeros(offsets[-1], dtype=torch.bool)
    for e in layer.frozen:
        mask[offsets[e] : offsets[e + 1]] = True
    return mask


def _local(parameter, mask):
    """This process's part of a sharded parameter and of the mask of its rows."""
    if not hasattr(parameter, "device_mesh"):
        return parameter.detach(), mask.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    whole = mask[:, None].expand(parameter.shape).to(parameter.device)
    part = distribute_tensor(
        whole.contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
    return parameter.detach().to_local(), part.to_local()[:, :1].flatten()
