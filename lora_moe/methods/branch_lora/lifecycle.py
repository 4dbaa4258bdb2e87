"""A task begins and ends: a router of its own, then the branches that it came to rely on are frozen.

Letters: E branches.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import nn

from ...growing import grow
from ...layers import LoraMoeLinear
from ...parts import normal
from ...reference import accumulator
from ...tensors import adapter_tensors
from .adapters import parts, router_of, routers_of, tell


def begin_task(model: nn.Module, *, router: bool = True) -> int:
    """Start to learn a task: each layer gets a router for it.  Make the optimizer afterwards.

    Args:
        model: see inject.
        router: False goes on with the router of the task before, if there is one.
    Returns:
        The task's number, 0 for the first.
    Raises:
        ValueError: a task is being learned already.
    """
    layers, course = parts(model)
    if course.learning:
        raise ValueError(f"begin_task: expected end_task for task {len(course.bank) - 1} first")
    for name, layer in layers.items():
        if router or not course.bank:
            add_router(layer, course.reads)
        routers_of(layer)[-1].requires_grad_(True)
        if len(layer.frozen) == layer.config.num_experts:
            warnings.warn(f"{name}: every branch is frozen; see add_branches", stacklevel=2)
    course.bank.append(len(routers_of(layer)) - 1)
    course.learning, course.task = True, len(course.bank) - 1
    tell(model, course)
    return course.task


def end_task(model: nn.Module, freeze: int | None = None) -> None:
    """Freeze in each layer the `freeze` branches that the task used most, and the task's router.

    A branch that an earlier task froze may be among them: then fewer become new.  What was learned
    stays; what a frozen branch adds can still change with the trunk, which every task trains.

    Args:
        model: see inject.
        freeze: how many; top_k of them by default, 0 for none.
    Raises:
        ValueError: no task is being learned, or freeze is negative.
    """
    layers, course = parts(model)
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
    """n new branches in each layer for the tasks that begin from now on; outputs keep their bits.

    It is lora_moe.grow: lora_B is a new parameter, so the optimizer is made afterwards.

    Raises:
        ValueError: n is no positive number, or the layers would exceed LoraMoeConfig's bounds.
    """
    layers, _ = parts(model)
    if type(n) is not int or n < 1:
        raise ValueError(f"n: expected a positive number of branches, got {n!r}")
    grow(model, n)
    for layer in layers.values():
        layer.usage = torch.cat([layer.usage, layer.usage.new_zeros(n)])


def add_router(layer: LoraMoeLinear, reads: str) -> None:
    """A router for one task more, which knows all branches that there are; the others stay as they are."""
    known = tuple(router.shape[0] for router in routers_of(layer))
    known = (*known, layer.config.num_experts)
    config = dataclasses.replace(layer.config, router=router_of(reads, len(known), known))
    name = f"router_weight_{len(known) - 1}"
    like = adapter_tensors(layer.base_layer, config)[name]
    weight = torch.empty_like(
        like, dtype=accumulator(layer.lora_A.dtype), device=layer.lora_A.device
    )
    layer.become(config, {name: nn.Parameter(normal(weight))})


def freeze_most_used(layer: LoraMoeLinear, k: int) -> None:
    """The k branches with the most usage, of those with any; lower ids first among equals."""
    usage = layer.usage.tolist() if k else []
    order = sorted(range(len(usage)), key=lambda e: (-usage[e], e))
    layer.frozen = {e for e in order[:k] if usage[e] > 0} | set(layer.frozen)
    layer.usage.zero_()
