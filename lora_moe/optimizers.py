"""Updates optimizers after grow has replaced parameters, or raises at their next step.

Otherwise an optimizer would silently step parameters that are no longer in the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

_MARK = "_lora_moe_replaced"
_hooks: list = []


def forget(parameters: Iterable[nn.Parameter]) -> None:
    """Make optimizers that step one of these parameters raise RuntimeError."""
    for parameter in parameters:
        setattr(parameter, _MARK, True)
        parameter.grad = None
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer, _args, _kwargs):
    if any(hasattr(p, _MARK) for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(
            "optimizer: expected the model's current parameters, got some that grow has replaced: pass the"
            " optimizer to grow(model, n, optimizer=), or create a new one after grow"
        )


def expect_growable(optimizer: Optimizer, replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Raise ValueError if the state of a parameter does not have the parameter's shape."""
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer: expected a torch optimizer, got {type(optimizer).__name__}")
    for old in replaced:
        for name, value in optimizer.state.get(old, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != old.shape:
                raise ValueError(
                    f"optimizer: expected state in the parameter's shape {tuple(old.shape)}, got {name} of"
                    f" {tuple(value.shape)}; create a new optimizer after grow instead"
                )


def replace(
    optimizer: Optimizer,
    replaced: Mapping[nn.Parameter, nn.Parameter],
    beside: Mapping[nn.Parameter, nn.Parameter],
) -> None:
    """Replace the optimizer's old parameters by the new ones; state for new rows is zero.

    Args:
        replaced: {old: new}.
        beside: {additional parameter: an existing parameter whose group it joins}.
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
