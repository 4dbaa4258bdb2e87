"""Router losses and statistics of a model's forwards, and the update of selection biases.

The losses of a single Routing are defined in router_losses.py and exported here.  Padding is always
excluded: the mask is the model's attention_mask, or use_routing's.

Letters: T tokens, E experts, K slots per token, B sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn

from . import forward_records
from .notices import tell_once
from .router_losses import (
    counts_of,
    cv_squared,
    label_loss,
    load_balance_loss,
    load_of,
    localized_cv_squared,
    router_entropy,
    straight_through_balance,
    z_loss,
)
from .steering import layers_of

__all__ = [
    "aux_loss",
    "counts_of",
    "cv_squared",
    "label_loss",
    "load_balance_loss",
    "localized_cv_squared",
    "router_entropy",
    "router_loss",
    "router_stats",
    "straight_through_balance",
    "update_selection_bias",
    "z_loss",
]


def aux_loss(model: nn.Module) -> torch.Tensor:
    """Mean over layers of  balance_coef * load_balance_loss + z_coef * z_loss.  Add it to the loss.

    Call it after the forward and before the backward, in the same thread; with gradient accumulation once
    per micro-batch, divided like the task loss.  If a layer ran several times since the last aux_loss or
    backward (such as the two forwards of DPO), each forward is weighted by its number of tokens.
    Forwards without gradients are ignored, as are forwards in evaluation mode while one in training mode
    is pending.  Calling it twice gives the same value; calling it under no_grad, for logging, has no side
    effects.  Padding is excluded: the mask is the model's attention_mask, or use_routing's.
    Layers with a routing override are excluded, as are layers with a single expert if other layers have
    several.  Under torch.compile, only the last forward counts.

    Args:
        model: a model with experts (see inject).
    Returns:
        0-dim tensor, differentiable with respect to routers and activations.
    Raises:
        ValueError: if the model has no experts.
        RuntimeError: if no forward has run yet, or it ran without a graph although the model trains, as
            in a reentrant activation checkpoint: use_reentrant=False keeps the gradient.
    """
    ran = _ran(model)
    losses, single = [], all(layer.config.num_experts == 1 for layer, _ in ran.values())
    for name, (layer, record) in ran.items():
        record.read |= torch.is_grad_enabled()
        runs = _owing(name, layer, record)
        if runs and (layer.config.num_experts > 1 or single):
            losses.append(_layer_loss(layer.config, runs))
    if not losses:
        layer, record = next(iter(ran.values()))
        _tell_nothing_to_balance(ran)
        return record.last.routing.weights.new_zeros(())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def _owing(name, layer, record):
    """The forwards of a layer that the loss counts: all pending ones, or the last one."""
    if record.pending:
        for run in record.pending:
            run.read |= torch.is_grad_enabled()
        return record.pending
    run = record.last
    if run.routing.lse is None:
        return []
    trains = layer.training and torch.is_grad_enabled()
    trains = trains and any(p.requires_grad for p in layer.router_parameters())
    if trains and layer.config.has_aux_loss and run.training and not run.has_graph:
        raise RuntimeError(
            f"aux_loss: expected a forward with a graph, but {name} ran without one"
            " (under no_grad, or in a reentrant checkpoint: pass use_reentrant=False)"
        )
    return [run]


def _layer_loss(config, runs):
    """Mean over the tokens of all runs of  balance_coef * balance + z_coef * z."""
    if not config.has_aux_loss:
        return runs[-1].routing.weights.new_zeros(())
    total, counted = 0, 0
    for run in runs:
        mask = run.tokens.counted()
        loss = 0
        if config.balance_coef:
            loss = loss + config.balance_coef * load_balance_loss(run.routing, mask, config.gate)
        if config.z_coef:
            loss = loss + config.z_coef * z_loss(run.routing, mask)
        if len(runs) == 1:
            return loss
        tokens = run.routing.lse.shape[0] if mask is None else mask.sum()
        total, counted = total + tokens * loss, counted + tokens
    return total / (max(counted, 1) if isinstance(counted, int) else counted.clamp(min=1))


def _tell_nothing_to_balance(ran):
    if all(layer.config.target_parameters for layer, _ in ran.values()):
        tell_once(
            "model's own router",
            "aux_loss is 0, as the model's own router picks the experts: call the model with"
            " output_router_logits=True to add its router loss, and leave out aux_loss",
        )
        return
    wanted = [layer for layer, _ in ran.values() if layer.config.has_aux_loss]
    if wanted and torch.is_grad_enabled() and wanted[0].training:
        tell_once(
            "nothing to balance",
            "aux_loss is 0, as no layer has logits to balance: the routing was overridden (task_ids or"
            " routing), or the configured router has no logits; leave out aux_loss, or set"
            " balance_coef and z_coef to 0",
        )


def router_loss(
    model: nn.Module, loss: Callable[..., torch.Tensor], *args, **options
) -> torch.Tensor:
    """Mean over layers of  loss(routing, *args, mask=mask, **options)  for their last forward.

        router_loss(model, losses.localized_cv_squared, expert_types, sample_types)     LoRAMoE
        router_loss(model, losses.label_loss, labels)                                   MeteoRA, MoA
        router_loss(model, losses.router_entropy)

    Call it after each forward, and add it to that forward's loss.  Padding and layers with a routing
    override are excluded, as in aux_loss.

    Args:
        model: a model with experts (see inject).
        loss: a function of a Routing and `mask`, from this module or your own.  If it has a parameter
            `gate`, the layer's gate is passed.
        args, options: further arguments, the same for every layer.
    Returns:
        0-dim tensor, differentiable with respect to routers and activations.
    Raises:
        ValueError: if the model has no experts, or every layer's routing was overridden.
        RuntimeError: if no forward has run yet, or it ran without a graph although the model trains.
    """
    ran = _ran(model)
    takes_gate = "gate" in inspect.signature(loss).parameters
    values, trains = [], False
    for layer, record in ran.values():
        run = record.last
        if run.routing.logits is None:
            continue
        gate = {"gate": layer.config.gate} if takes_gate else {}
        mask = run.tokens.counted()
        values.append(loss(run.routing, *args, mask=mask, **gate | options))
        trains |= run.training and torch.is_grad_enabled()
    if not values:
        raise ValueError(
            "model: expected a layer that used its router, but every routing was overridden"
            " (task_ids or routing)"
        )
    total = torch.stack([value.to(values[0].device) for value in values]).mean()
    if trains and not total.requires_grad:
        raise RuntimeError(
            "router_loss: expected a forward with a graph, but it ran without one (under no_grad, in a"
            " reentrant checkpoint: pass use_reentrant=False, or with every router frozen)"
        )
    return total


def router_stats(model: nn.Module, training: bool | None = None) -> dict[str, dict]:
    """Load statistics of each layer's last forward, on the CPU; synchronizes with the device.

    Args:
        model: a model with experts.
        training: True for the last forward in training mode, False for the last in evaluation mode,
            None for the last in any mode.
    Returns:
        {module path: statistics} of the layers that have run, excluding padding, with the statistics
            load           (E,), share of the slots per expert
            utilization    (E,), load / ideal = load * E
            max_over_mean  float, the largest utilization
            dead           ids of the experts that got no token
            entropy        router_entropy in nats, None if the routing was overridden
    Raises:
        ValueError: if the model has no experts.
        RuntimeError: if no such forward has run yet in this thread.
    """
    kind = {None: "last", True: "training", False: "evaluation"}[training]
    runs = {name: getattr(record, kind) for name, (_, record) in _ran(model).items()}
    runs = {name: run for name, run in runs.items() if run is not None}
    if not runs:
        raise RuntimeError(f"model: expected a forward in {kind} mode to have run, got none")
    return {name: _statistics(run) for name, run in runs.items()}


@torch.no_grad()
def update_selection_bias(model: nn.Module, rate: float = 0.001) -> None:
    """b += rate * sign(mean(counts) - counts): loss-free balancing; call it once after each step.

    Updates layers with selection_bias whose router ran in their last training forward (or last forward,
    if none was in training mode), excluding padding.  Counts are local to the process; with DDP, the
    broadcast of buffers distributes rank 0's result.

    Raises:
        ValueError: if the model has no experts, or no layer has a selection_bias.
        RuntimeError: if no forward has run yet.
    Source: Wang et al. 2024 (Auxiliary-loss-free load balancing), arXiv 2408.15664, algorithm 1; SMoRA
    (arXiv 2501.15103) updates its bias in the same way.
    """
    ran = [pair for pair in _ran(model).values() if pair[0].selection_bias is not None]
    if not ran:
        raise ValueError("model: expected layers with selection_bias=True, got none")
    for layer, record in ran:
        run = record.training or record.last
        if run.routing.logits is not None:
            counts = counts_of(run.routing, run.tokens.counted()).to(layer.selection_bias.dtype)
            layer.selection_bias += rate * torch.sign(counts.mean() - counts)


def _ran(model):
    """{path: (layer, its record)} of the layers that have run in this thread."""
    records_of = {
        name: (layer, forward_records.record_of(layer)) for name, layer in layers_of(model).items()
    }
    ran = {name: pair for name, pair in records_of.items() if pair[1].last is not None}
    if not ran:
        raise RuntimeError("model: expected a forward before this call, but no layer has run yet")
    return ran


@torch.no_grad()
def _statistics(run):
    routing, mask = run.routing, run.tokens.counted()
    load = load_of(routing, mask).cpu()
    utilization = load * routing.num_experts
    return {
        "load": load,
        "utilization": utilization,
        "max_over_mean": float(utilization.max()),
        "dead": torch.nonzero(load == 0).flatten().tolist(),
        "entropy": None if routing.logits is None else float(router_entropy(routing, mask)),
    }
