"""Optimizers that hold parameters which others have replaced: they get the new ones, or are told.

Nothing else would: an optimizer steps a parameter that no module has any more without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

_MARK = "_lora_moe_replaced"
_hooks: list = []


def forget(parameters: Iterable[nn.Parameter]) -> None:
    """From now on an optimizer that steps one of these raises RuntimeError."""
    for parameter in parameters:
        setattr(parameter, _MARK, True)
        parameter.grad = None
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer, _args, _kwargs):
    if any(hasattr(p, _MARK) for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(
            "optimizer: expected the model's parameters, got some that grow replaced, which nothing reads"
            " any more: pass it to grow(model, n, optimizer=), or make a new one after grow"
        )


def expect_growable(optimizer: Optimizer, replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Raises ValueError where its state of a parameter is not one value for each of its own."""
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer: expected a torch optimizer, got {type(optimizer).__name__}")
    for old in replaced:
        for name, value in optimizer.state.get(old, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != old.shape:
                raise ValueError(
                    f"optimizer: expected state in the parameter's shape {tuple(old.shape)}, got {name} of"
                    f" {tuple(value.shape)}; make a new optimizer after grow instead"
                )


def replace(
    optimizer: Optimizer,
    replaced: Mapping[nn.Parameter, nn.Parameter],
    beside: Mapping[nn.Parameter, nn.Parameter],
) -> None:
    """Put new parameters where it held the old ones, their state of the new rows zero.

    Args:
        replaced: {old: new}.
        beside: {a parameter that had no predecessor: one after whose group's it goes}.
    """
    for group in optimizer.param_groups:
        params = [replaced.get(p, p) for p in group["params"]]
        held = set(map(id, params))
        group["params"] = params + [p for p, other in beside.items() if id(other) in held]
    for old, new in replaced.items():
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {name: _grown(value, old, new) for name, value in state.items()}


def _grown(value, old, new):
    if not isinstance(value, torch.Tensor) or not value.dim():
        return value
    grown = value.new_zeros(new.shape)
    grown[tuple(slice(size) for size in old.shape)] = value
    return grown
