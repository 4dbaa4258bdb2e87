"""Router losses and statistics of a model's last forward, and how a step balances its routers.

The losses of one Routing are in router_losses.py; they are public here.  Padding counts nowhere: the mask is
the model's attention_mask, or use_routing's.

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

    Call it after the forward and before the backward, in this thread; in gradient accumulation once for
    each micro-batch, divided as the task's loss is.  A layer that ran several times since the last
    aux_loss or backward (two forwards of DPO, say) counts each of these forwards by its tokens.
    Forwards without gradients change nothing, nor do those in evaluation mode while one in training mode
    waits; reading twice gives the same, and reading under no_grad, to log it, settles nothing.  Padding
    counts nowhere: the mask is the model's attention_mask, or use_routing's.
    Layers whose routing the caller supplied have no router and do not count, nor does one with a single
    expert beside layers with several.

    Under torch.compile the last forward counts.

    Args:
        model: with experts in it (see inject).
    Returns:
        0-dim tensor, differentiable with respect to routers and activations.
    Raises:
        ValueError: the model has no experts.
        RuntimeError: no forward has run yet, or it ran without a graph although the model trains,
            as inside a reentrant activation checkpoint: use_reentrant=False keeps the gradient.
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
    """The forwards of a layer whose loss is due: all that wait, or the last one."""
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
            "aux_loss is 0, as the model's own router decides: the model adds a loss for it where it is"
            " called with output_router_logits=True; leave aux_loss out",
        )
        return
    wanted = [layer for layer, _ in ran.values() if layer.config.has_aux_loss]
    if wanted and torch.is_grad_enabled() and wanted[0].training:
        tell_once(
            "nothing to balance",
            "aux_loss is 0, as no layer has logits to balance: the caller decided the routing (task_ids or"
            " routing), or the configuration's router has none; leave it out of the loss, or set"
            " balance_coef and z_coef to 0",
        )


def router_loss(
    model: nn.Module, loss: Callable[..., torch.Tensor], *args, **options
) -> torch.Tensor:
    """Mean over layers of  loss(routing, *args, mask=mask, **options)  of their last forward.

        router_loss(model, losses.localized_cv_squared, expert_types, sample_types)     LoRAMoE
        router_loss(model, losses.label_loss, labels)                                   MeteoRA, MoA
        router_loss(model, losses.router_entropy)

    Call it after each forward whose loss it is to join.  Padding counts nowhere, as in aux_loss; layers
    whose routing the caller supplied do not count.

    Args:
        model: with experts in it (see inject).
        loss: a function of a Routing with `mask`, of this module or your own.  One that takes `gate` is
            given the layer's.
        args, options: what else it takes, the same for every layer.
    Returns:
        0-dim tensor, differentiable with respect to routers and activations.
    Raises:
        ValueError: the model has no experts, or no layer's router decided; or what `loss` raises.
        RuntimeError: no forward has run yet, or it ran without a graph although the model trains.
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
            "model: expected a layer whose router decided, got routings by the caller alone"
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
    """What each layer's last forward did with its experts, on the CPU; waits for the device.

    Args:
        model: with experts in it.
        training: True or False for the last forward in training or in evaluation mode, which leave each
            other's statistics alone; None for the last of all.
    Returns:
        {module path: statistics} of the layers that have run, without padding, with the statistics
            load           (E,), share of the slots that went to each expert
            utilization    (E,), load / ideal = load * E
            max_over_mean  float, the largest utilization
            dead           ids of the experts that got no token
            entropy        router_entropy in nats, None where the caller supplied the routing
    Raises:
        ValueError: the model has no experts.
        RuntimeError: no such forward has run yet in this thread.
    """
    kind = {None: "last", True: "training", False: "evaluation"}[training]
    runs = {name: getattr(record, kind) for name, (_, record) in _ran(model).items()}
    runs = {name: run for name, run in runs.items() if run is not None}
    if not runs:
        raise RuntimeError(f"model: expected a forward in {kind} mode to have run, got none")
    return {name: _statistics(run) for name, run in runs.items()}


@torch.no_grad()
def update_selection_bias(model: nn.Module, rate: float = 0.001) -> None:
    """b += rate * sign(mean(counts) - counts): balance without a loss, once after each step.

    Only layers with selection_bias whose router ran in their last training forward (the last of all
    before any); padding does not count.  The counts are this process's own; DDP's broadcast of buffers
    makes those of rank 0 decide.

    Raises:
        ValueError: the model has no experts, or none of them has a selection_bias.
        RuntimeError: no forward has run yet.
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
        raise RuntimeError("model: expected a forward to have run, but no layer has a routing yet")
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
