"""The gradient of x in one sum: where the base is a plain frozen linear, its part of dx is added to ours.

    dx = dx of the experts + dy W0

PyTorch would form both on their own and add them in a launch that reads and writes three tensors of x's
size.  The product that adds in place reads one.  Whatever else may look at the base's call or its weight,
hooks, autocast, another class, a weight that trains or is in pieces, takes PyTorch's way.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as every_module

from . import backend
from .checks import autocast_enabled

BACKENDS = {"triton", "cuda"}  # whose dx takes the base's part in

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def base_weight(base: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """W0 (D_out, D_in), if dx may take dy W0 in; else None."""
    if (
        type(base) is not nn.Linear
        or type(x) is not torch.Tensor
        or not (torch.is_grad_enabled() and x.requires_grad)
        or backend.serving(x.device.type) not in BACKENDS
    ):
        return None
    weight, bias = (base._parameters.get(name) for name in ("weight", "bias"))
    plain = type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
    if not plain or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    fits = weight.dtype == x.dtype and weight.device == x.device and weight.dim() == 2
    if not fits or autocast_enabled(x.device.type) or _watched(base):
        return None
    return weight


def _watched(base):
    """Whether somebody put a forward or a hook of their own there, as offloading does."""
    own = "forward" in base.__dict__ or any(getattr(base, name) for name in _HOOKS)
    return own or every_module._has_any_global_hook()
