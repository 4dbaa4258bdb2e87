"""Mixtures of LoRA experts into a model's linear modules, and out again.

Modules are replaced by object, not by name: what a model shares under two names stays shared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import nn

from .config import LoraMoeConfig
from .layers import LoraMoeLinear
from .routing import Routing
from .targets import targets_of

_log = logging.getLogger(__name__)


def inject(model: nn.Module, config: LoraMoeConfig, *, freeze: bool = True) -> nn.Module:
    """Replace the modules that config.target_modules names by LoraMoeLinear, in place.

    A module that is known under several names becomes one adapter under all of them; it is left
    alone if any of its names is excluded.  What is not named stays the same object, tied weights
    stay tied.  May be called again with another configuration for other modules.

    Args:
        model: any nn.Module.
        config: what to build, and where (see LoraMoeConfig).
        freeze: set requires_grad to False on every parameter that belongs to no adapter.
    Returns:
        The same model; `injected(model)` tells what was replaced.
    Raises:
        ValueError: nothing matches (the message lists linear modules), a match is not linear or
            already has experts, or its parent reads its weight without calling it.  The model is
            unchanged.
    """
    found = targets_of(model, config)
    adapters = {base: LoraMoeLinear(base, config) for base in dict.fromkeys(found.values())}
    place(model, adapters)
    if freeze:
        freeze_base(model)
    _log.info("%d modules replaced: %s", len(adapters), ", ".join(found))
    return model


def remove(model: nn.Module) -> nn.Module:
    """Put the base modules back and drop the experts; what was frozen stays frozen.

    Args:
        model: with experts in it.
    Returns:
        The same model.
    Raises:
        ValueError: the model has no experts, or is itself the one LoraMoeLinear.
    """
    if isinstance(model, LoraMoeLinear):
        raise ValueError(
            "model: expected a module that holds LoraMoeLinear, got one; take base_layer"
        )
    place(model, {layer: layer.base_layer for layer in layers_of(model).values()})
    return model


def injected(model: nn.Module) -> dict[str, LoraMoeLinear]:
    """The model's LoraMoeLinear modules by their (first) path; empty if there are none."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraMoeLinear)}


def set_routing(
    model: nn.Module,
    task_ids: torch.Tensor | None = None,
    routing: Routing | Mapping[str, Routing] | None = None,
) -> None:
    """Decide the routing of the following forwards from outside, or give it back to the routers.

    What is set stays until the next call, so that an activation-checkpoint recompute sees the same.
    Each call decides for all layers, and forgets their last forward's routing.

    Args:
        model: with experts in it.
        task_ids: integers, -1 for no expert: (B,) one per sample or (T,) one per token; (B, K) or
            (T, K) for several experts each.  The weights are 1.
        routing: a Routing for all layers, with a row for each token or for each sample (first
            dimension) of the layers' input; or a dict from module path to Routing, for example a
            replay of {name: layer.routing}, where layers that it does not name go back to their
            routers.  Weights that require a gradient get one.
    Raises:
        ValueError: both are given, the model has no experts, a path is unknown, or a number of
            experts is not the layer's.  Nothing changes then.
        TypeError: task_ids are no integers.
    """
    layers = layers_of(model)
    sources = _sources(layers, task_ids, routing)
    moved: dict = {}  # one copy for all layers of a device
    given = {name: _given(name, layers[name], source, moved) for name, source in sources.items()}
    for name, layer in layers.items():
        layer.given, layer.routing = given.get(name), None


def _sources(layers, task_ids, routing):
    """{path: Routing} of the layers that the caller decides for."""
    if task_ids is not None and routing is not None:
        raise ValueError("routing: expected task_ids or routing, got both")
    if task_ids is not None:
        counts = {name: layer.config.num_experts for name, layer in layers.items()}
        by_count = {E: Routing.from_ids(task_ids, num_experts=E) for E in set(counts.values())}
        return {name: by_count[E] for name, E in counts.items()}
    if not isinstance(routing, Mapping):
        return {} if routing is None else dict.fromkeys(layers, routing)
    unknown = sorted(set(routing) - set(layers))
    if unknown:
        raise ValueError(f"routing: expected paths of injected modules, got {unknown}")
    return routing


def _given(name, layer, routing, moved):
    """The caller's decision on the layer's device, without a router's statistics: they are stale."""
    if not isinstance(routing, Routing):
        raise ValueError(f"routing: expected a Routing, got {type(routing).__name__}")
    if routing.num_experts != layer.config.num_experts:
        raise ValueError(
            f"routing: expected {layer.config.num_experts} experts for {name},"
            f" got {routing.num_experts}"
        )
    device = layer.lora_A.device
    key = id(routing), device
    if key not in moved:
        moved[key] = Routing(*(t.to(device) for t in routing[:3]))
    return moved[key]


# --- shared with io and losses -------------------------------------------------------------------


def layers_of(model: nn.Module) -> dict[str, LoraMoeLinear]:
    """injected(model), or ValueError where there is nothing."""
    layers = injected(model)
    if not layers:
        raise ValueError("model: expected one with LoraMoeLinear modules (see inject), got none")
    return layers


def place(model: nn.Module, replacement: Mapping[nn.Module, nn.Module]) -> None:
    """Put replacement[m] wherever the model holds m, under all of its names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() hides second names
            if child in replacement:
                setattr(parent, name, replacement[child])


def freeze_base(model: nn.Module) -> None:
    """requires_grad = False on every parameter that belongs to no adapter."""
    adapters = {p for layer in injected(model).values() for p in layer.parameters(recurse=False)}
    for parameter in model.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(False)
