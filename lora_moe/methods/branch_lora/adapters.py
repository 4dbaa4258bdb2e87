"""Adds BranchLoRA's layers to a model, and sets the tasks and masks of a batch."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ...config import LoraMoeConfig
from ...injection import inject as inject_experts
from ...layers import LoraMoeLinear
from ...routers import PerTaskRouter, Router, SequenceRouter
from ...steering import injected, set_routing
from .counting import Count, Course

ROUTE_BY = ("first", "mean", "token")


def inject(
    model: nn.Module,
    config: LoraMoeConfig,
    *,
    route_by: str = "first",
    fixed_opening: bool = True,
    modules_to_save: tuple[str, ...] = (),
) -> nn.Module:
    """lora_moe.inject with branches, initially without a router.

    Everything else is frozen, except `modules_to_save`.  Padding is read from the model's attention_mask.
    In a causal model, tokens from the first labeled one on do not affect the routing, because they do not
    exist yet in generation.  Generation reuses the prompt's routing (see SequenceRouter).

    In a causal model the first token attends to no other.  If all sequences start the same way, with a BOS
    token or a chat template, it is uninformative: the mean is used instead, with a warning.

    Args:
        model: a Hugging Face model, or any module whose forward takes attention_mask.
        config: see branch_lora().
        route_by: "first", "mean" or "token": the router's input.
        fixed_opening: False if the sequences of a causal model differ in their first token.
        modules_to_save: names of further modules that are trained and saved, such as a projector.
    Returns:
        The same model; call begin_task next.
    Raises:
        ValueError: if an argument is invalid, nothing matches, or the model already has branches.
    """
    if route_by not in ROUTE_BY:
        raise ValueError(f"route_by: expected one of {ROUTE_BY}, got {route_by!r}")
    if branch_layers(model):
        raise ValueError("model: expected one without branches")
    if not config.shared_a or config.selection_bias or config.router or config.middle:
        raise ValueError(
            "config: expected shared_a=True and neither selection_bias nor router; see branch_lora()"
        )
    if len(set(config.scales)) > 1:
        raise ValueError(f"alpha: expected one for all branches, got {config.alpha}")
    trained = [model.get_submodule(name) for name in modules_to_save]
    if route_by == "first" and fixed_opening and getattr(model, "can_generate", bool)():
        route_by = "mean"
        warnings.warn(
            "the first token of a causal model attends to no other and is the same with a fixed"
            " opening: routing by the mean instead (fixed_opening=False uses the first token)",
            stacklevel=2,
        )
    known = set(injected(model).values())
    alpha = config.alpha[0] if isinstance(config.alpha, tuple) else config.alpha
    fields = {"alpha": alpha, "r": config.ranks[0], "router": router_of(route_by, 0)}
    inject_experts(model, dataclasses.replace(config, **fields))
    course = Course(route_by, tuple(modules_to_save))
    for layer in set(injected(model).values()) - known:
        Count.attach(layer, course)
    for module in trained:
        module.requires_grad_(True)
    return model


def router_of(route_by: str, num_tasks: int, known: tuple[int, ...] = ()) -> Router:
    """One router per task, per token or sequence; known[t] is the number of experts of router t."""
    bank = PerTaskRouter(num_tasks, known)
    return bank if route_by == "token" else SequenceRouter(route_by, bank)


def set_task(model: nn.Module, task: int | Sequence[int] | torch.Tensor) -> None:
    """Set the task whose router is used from now on: one task, or (B,) tasks, one per sequence.

    Like lora_moe.set_routing(model, task_ids=), except for tasks that continue with an earlier task's router.

    Raises:
        ValueError: if there is no such task.
    """
    _, course = state_of(model)
    known = len(course.bank)
    tasks = torch.as_tensor(task)
    if tasks.is_floating_point() or tasks.dtype == torch.bool or tasks.dim() > 1:
        raise ValueError(f"task: expected a number or (B,) numbers, got {task!r}")
    if tasks.numel() and not 0 <= int(tasks.min()) <= int(tasks.max()) < known:
        raise ValueError(f"task: expected numbers in [0, {known}), got {tasks.tolist()}")
    course.task = tasks if tasks.dim() else int(tasks)
    tell(model, course)


def tell(model: nn.Module, course: Course) -> None:
    """Pass the course's task to the layers, as the number of its router."""
    bank = torch.tensor(course.bank)
    set_routing(model, task_ids=bank[torch.as_tensor(course.task).cpu()])


def set_mask(model: nn.Module, mask: torch.Tensor | None) -> None:
    """Set which tokens may affect the routing, (B, L), overriding the model's arguments; None restores these.

    For models without a two-dimensional attention_mask, or a loss outside of the model: exclude the answer's
    tokens.
    """
    layers, _ = state_of(model)
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"mask: expected (B, L), got {tuple(mask.shape)}")
    for layer in layers.values():
        layer.mask = mask


def branch_layers(model: nn.Module) -> dict[str, LoraMoeLinear]:
    """The model's layers with branches, by (first) path; empty if there are none."""
    return {name: layer for name, layer in injected(model).items() if Count.of(layer)}


def branches_of(layer: LoraMoeLinear) -> list[torch.Tensor]:
    """(r, D_out) of each branch: views of lora_B."""
    return list(layer.lora_B.split(layer.config.ranks[0]))


def routers_of(layer: LoraMoeLinear) -> list[nn.Parameter]:
    """(E_t, D_in) of each task's router."""
    return layer.router_parameters()


def state_of(model: nn.Module) -> tuple[dict[str, LoraMoeLinear], Course]:
    layers = branch_layers(model)
    if not layers:
        raise ValueError("model: expected one with branches (see inject), got none")
    return layers, Count.of(next(iter(layers.values())))
