"""Fuses the base's gradient into the experts': dx = dx of the experts + dy W0.

PyTorch would compute both terms separately and add them in a launch that reads or writes three tensors of
x's size; accumulating in the product reads one.  Applies only if the base is a plain frozen nn.Linear:
hooks, autocast, subclasses, and trainable or sharded weights use PyTorch's autograd.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as every_module

from . import backend
from .checks import autocast_enabled

BACKENDS = {"triton", "cuda"}  # that support the fusion

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def base_weight(base: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """W0 (D_out, D_in) if dy W0 can be fused into dx, else None."""
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
    """Whether the module has a replaced forward or a hook, as from offloading."""
    own = "forward" in base.__dict__ or any(getattr(base, name) for name in _HOOKS)
    return own or every_module._has_any_global_hook()
