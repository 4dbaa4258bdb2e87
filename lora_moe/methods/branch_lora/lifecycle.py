"""The lifecycle of a task: begin_task adds a router, end_task freezes the most used branches.

Letters: E branches.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import nn

from ...components import normal
from ...growing import grow
from ...layers import LoraMoeLinear
from ...reference import accumulator
from ...tensors import adapter_tensors
from .adapters import router_of, routers_of, state_of, tell


def begin_task(model: nn.Module, *, router: bool = True) -> int:
    """Start learning a task: each layer gets a router for it.  Create the optimizer afterwards.

    Args:
        model: see inject.
        router: False continues with the previous task's router, if there is one.
    Returns:
        The task's number, 0 for the first.
    Raises:
        ValueError: if a task is already being learned.
    """
    layers, course = state_of(model)
    if course.learning:
        raise ValueError(f"begin_task: expected end_task for task {len(course.bank) - 1} first")
    for name, layer in layers.items():
        if router or not course.bank:
            add_router(layer, course.route_by)
        routers_of(layer)[-1].requires_grad_(True)
        if len(layer.frozen) == layer.config.num_experts:
            warnings.warn(f"{name}: every branch is frozen; see add_branches", stacklevel=2)
    course.bank.append(len(routers_of(layer)) - 1)
    course.learning, course.task = True, len(course.bank) - 1
    tell(model, course)
    return course.task


def end_task(model: nn.Module, freeze: int | None = None) -> None:
    """Freeze each layer's `freeze` most used branches, and the task's router.

    These may include branches that are already frozen.  A frozen branch's output can still change with the
    trunk, which every task trains.

    Args:
        model: see inject.
        freeze: number of branches; top_k by default, 0 for none.
    Raises:
        ValueError: if no task is being learned, or freeze is negative.
    """
    layers, course = state_of(model)
    if not course.learning:
        raise ValueError("end_task: expected begin_task first")
    if freeze is not None and (type(freeze) is not int or freeze < 0):
        raise ValueError(f"freeze: expected a number of branches, got {freeze!r}")
    for layer in layers.values():
        freeze_most_used(layer, layer.config.top_k if freeze is None else freeze)
        for router in routers_of(layer):
            router.requires_grad_(False)
    course.learning = False


def add_branches(model: nn.Module, n: int) -> None:
    """Add n branches to each layer for new tasks; outputs stay bitwise unchanged.

    Uses lora_moe.grow: lora_B is a new parameter, so create the optimizer afterwards.

    Raises:
        ValueError: if n is not positive, or the layers would exceed LoraMoeConfig's bounds.
    """
    layers, _ = state_of(model)
    if type(n) is not int or n < 1:
        raise ValueError(f"n: expected a positive number of branches, got {n!r}")
    grow(model, n)
    for layer in layers.values():
        layer.usage = torch.cat([layer.usage, layer.usage.new_zeros(n)])


def add_router(layer: LoraMoeLinear, route_by: str) -> None:
    """Add a router for one more task with all current branches; other routers do not change."""
    known = tuple(router.shape[0] for router in routers_of(layer))
    known = (*known, layer.config.num_experts)
    config = dataclasses.replace(layer.config, router=router_of(route_by, len(known), known))
    name = f"router_weight_{len(known) - 1}"
    like = adapter_tensors(layer.base_layer, config)[name]
    weight = torch.empty_like(
        like, dtype=accumulator(layer.lora_A.dtype), device=layer.lora_A.device
    )
    layer.become(config, {name: nn.Parameter(normal(weight))})


def freeze_most_used(layer: LoraMoeLinear, k: int) -> None:
    """Freeze the k most used branches with nonzero usage; ties go to the lower id."""
    usage = layer.usage.tolist() if k else []
    order = sorted(range(len(usage)), key=lambda e: (-usage[e], e))
    layer.frozen = {e for e in order[:k] if usage[e] > 0} | set(layer.frozen)
    layer.usage.zero_()
