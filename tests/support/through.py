"""Runs public functions with given launchers for their operators, regardless of the tensors' device."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_moe import backend
from lora_moe import functional as F

NAMES = ("y", "dx", "dw", "da", "db")


@contextlib.contextmanager
def through(kernels):
    """Runs our operators through the launchers of `kernels`, with Triton's plans."""
    with _Through(kernels), mock.patch.object(backend, "serving", lambda device_type: "triton"):
        yield


class _Through(TorchDispatchMode):
    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "lora_moe":
            return func(*args, **(kwargs or {}))
        with self:
            return getattr(self.kernels, func._opname)(*args, **(kwargs or {}))


def results(v, case, dtype):
    """(y of routed_lora, all gradients), named by NAMES, for the same gradient of y in every dtype."""
    leaves = [
        v[name].detach().requires_grad_() for name in ("x", "router_weight", "lora_A", "lora_B")
    ]
    y, _ = F.routed_lora(
        *leaves, case.K, rank_offsets=case.offsets, scaling=v["scaling"], base=v["base"],
        shared_a=case.shared_a, bias=v["bias"], router_bias=v["router_bias"], **case.options,
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=g, dtype=torch.float64).to(dtype)
    return y, *torch.autograd.grad(y, leaves, dy)
