"""Router losses and statistics: functions of a Routing's tensors, with no one-hot of the choice.

Each takes `mask` (T,), nonzero for the tokens that count: padding has no part in a mean, a load or a
gradient, whatever its rows hold.

Letters: T tokens, E experts, K slots per token, B sequences.
"""

from __future__ import annotations

import torch
from torch import nn

from . import records
from .notices import tell_once
from .reference import gate_values
from .routing import Routing
from .steering import layers_of


def load_balance_loss(
    routing: Routing, mask: torch.Tensor | None = None, gate: str = "softmax"
) -> torch.Tensor:
    """E * sum_e f_e P_e, f_e the share of slots that went to e, P_e the mean gate: 1 when balanced.

    The gradient flows through P.  Sigmoid gates do not sum to one: balanced is then E * mean(P).

    Args:
        routing: from a router.
        mask: (T,), nonzero for the tokens that count; None counts all.
        gate: of that router, "softmax" or "sigmoid"; only a mask asks for it.
    Returns:
        0-dim, fp32 (fp64).
    Raises:
        ValueError: the caller supplied the routing, so there is no router to balance; or the mask is
            not (T,).
    Source: Fedus et al. 2021 (Switch Transformers), arXiv 2101.03961, eq. 4-6, over K slots.
    """
    return routing.num_experts * (_load(routing, mask) * _mean_prob(routing, mask, gate)).sum()


def cv_squared(
    routing: Routing, mask: torch.Tensor | None = None, gate: str = "softmax"
) -> torch.Tensor:
    """Var(P) / Mean(P)^2, P_e the mean gate of e: 0 when balanced, E - 1 when collapsed.

    P is taken before the top-k, so that it is smooth; with K = E it is the source's importance.

    Args, Returns, Raises: as load_balance_loss.
    Source: Shazeer et al. 2017 (Sparsely-Gated MoE), arXiv 1701.06538, eq. 6-7.
    """
    return _cv_squared(_mean_prob(routing, mask, gate))


def localized_cv_squared(
    routing: Routing,
    expert_types: torch.Tensor,
    sample_types: torch.Tensor,
    delta: float = 0.1,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """CV^2 of  Z_be = (1 + delta if the types of b and e agree else 1 - delta) * sum_{t in b} p_te.

    p is the softmax of the logits.  Experts of a sequence's type are led to take more of it than
    the others, balanced among themselves.

    Args:
        routing: from a router, for B sequences of equal length.
        expert_types: (E,) integers.
        sample_types: (B,) integers.
        delta: in [0, 1).
        mask: (T,), nonzero for the tokens that count; None counts all.
    Returns:
        0-dim, fp32 (fp64).
    Raises:
        ValueError: the caller supplied the routing, or T is no multiple of B.
    Source: Dou et al. 2024 (LoRAMoE), arXiv 2312.09979, eq. 6-8.
    """
    _require(routing, "logits")
    T, B = routing.logits.shape[0], sample_types.shape[0]
    if B == 0 or T % B:
        raise ValueError(f"sample_types: expected one per sequence of {T} tokens, got {B}")
    logits, kept = _masked(routing, mask)
    gates = torch.where(kept, torch.softmax(logits, 1), 0).unflatten(0, (B, -1)).sum(1)  # (B, E)
    agree = sample_types[:, None] == expert_types[None]
    return _cv_squared(gates * torch.where(agree, 1 + delta, 1 - delta))


def z_loss(routing: Routing, mask: torch.Tensor | None = None) -> torch.Tensor:
    """mean_t logsumexp(logits_t)^2: keeps the router's logits small.

    Args:
        routing: from a router.
        mask: (T,), nonzero for the tokens that count; None counts all.
    Raises:
        ValueError: the caller supplied the routing, or the mask is not (T,).
    Source: Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, eq. 5.
    """
    _require(routing, "lse")
    if mask is None:
        return routing.lse.square().sum() / max(routing.lse.shape[0], 1)
    logits, kept = _masked(routing, mask)
    lse = torch.where(kept[:, 0], torch.logsumexp(logits, 1), 0)
    return lse.square().sum() / kept.sum().clamp(min=1)


def router_entropy(routing: Routing, mask: torch.Tensor | None = None) -> torch.Tensor:
    """mean_t of -sum_e p_te log p_te in nats, p the softmax: log E when undecided, 0 when sure.

    Args, Raises: as z_loss.
    """
    logits, kept = _masked(routing, mask)
    logp = torch.log_softmax(logits, 1)
    entropy = torch.where(kept[:, 0], -(logp.exp() * logp).sum(1), 0)
    return entropy.sum() / kept.sum().clamp(min=1)


def label_loss(
    routing: Routing, labels: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """mean_t of lse_t - logits_t[label_t]: cross-entropy that teaches the router the right expert.

    Args:
        routing: from a router.
        labels: (T,) integers, an expert each; -100 leaves the token out.
        mask: (T,), nonzero for the tokens that count; None counts all.
    Raises:
        ValueError: the caller supplied the routing, or the mask is not (T,).
    Source: Xu et al. 2024 (MeteoRA), arXiv 2405.13053.
    """
    logits, kept = _masked(routing, mask)
    labels = torch.where(kept[:, 0], labels.long(), -100)
    counted = (labels != -100).sum().clamp(min=1)
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / counted


def aux_loss(model: nn.Module) -> torch.Tensor:
    """Mean over layers of  balance_coef * load_balance_loss + z_coef * z_loss.  Add it to the loss.

    Call it after the forward and before the backward, in this thread; in gradient accumulation once for
    each micro-batch, divided as the task's loss is.  A layer that ran several times since the last
    aux_loss or backward (two forwards of DPO, say) counts each of these forwards by its tokens.
    Forwards without gradients change nothing, nor do those in evaluation mode while one in training mode
    waits; reading twice gives the same, and reading under no_grad, to log it, settles nothing.  Padding
    counts nowhere: the mask is the model's attention_mask, or use_routing's.
    Layers whose routing the caller supplied have no router and do not count.

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
    losses = []
    for name, (layer, record) in ran.items():
        record.read |= torch.is_grad_enabled()
        runs = _owing(name, layer, record)
        if runs:
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
    trains = layer.training and layer.router_weight.requires_grad and torch.is_grad_enabled()
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
        balance = config.balance_coef * load_balance_loss(run.routing, mask, config.gate)
        loss = balance + config.z_coef * z_loss(run.routing, mask)
        if len(runs) == 1:
            return loss
        tokens = run.routing.lse.shape[0] if mask is None else mask.sum()
        total, counted = total + tokens * loss, counted + tokens
    return total / (max(counted, 1) if isinstance(counted, int) else counted.clamp(min=1))


def _tell_nothing_to_balance(ran):
    wanted = [layer for layer, _ in ran.values() if layer.config.has_aux_loss]
    if wanted and torch.is_grad_enabled() and wanted[0].training:
        tell_once(
            "nothing to balance",
            "aux_loss is 0, as the caller decided every layer's routing (task_ids or routing) and no router"
            " ran: leave it out of the loss, or set balance_coef and z_coef to 0",
        )


def router_stats(model: nn.Module, training: bool | None = None) -> dict[str, dict]:
    """What each layer's last forward did with its experts, on the CPU; waits for the device.

    Args:
        model: with experts in it.
        training: True or False for the last forward in training or in evaluation mode, which leave each
            other's statistics alone; None for the last of all.
    Returns:
        {module path: statistics} of the layers that have run, without padding, with the statistics
            load           (E,), share of the slots that went to each expert
            utilisation    (E,), load / ideal = load * E
            max_over_mean  float, the largest utilisation
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
    Source: Wang et al. 2024 (Auxiliary-loss-free load balancing), arXiv 2408.15664, algorithm 1.
    """
    ran = [pair for pair in _ran(model).values() if pair[0].selection_bias is not None]
    if not ran:
        raise ValueError("model: expected layers with selection_bias=True, got none")
    for layer, record in ran:
        run = record.training or record.last
        if run.routing.logits is not None:
            counts = counts_of(run.routing, run.tokens.counted()).to(layer.selection_bias.dtype)
            layer.selection_bias += rate * torch.sign(counts.mean() - counts)


def _require(routing, field):
    if getattr(routing, field) is None:
        raise ValueError(f"routing: expected {field} from a router, got a routing by the caller")


def _masked(routing, mask):
    """The logits, zero where a token does not count, and (T, 1) bool whether it does.

    Rows that do not count may hold NaN: they are replaced, not multiplied by zero.
    """
    _require(routing, "logits")
    logits = routing.logits
    if mask is None:
        return logits, torch.ones_like(logits[:, :1], dtype=torch.bool)
    kept = _fitted(mask, logits)[:, None] != 0
    return torch.where(kept, logits, 0), kept


def _fitted(mask, rows):
    if not isinstance(mask, torch.Tensor) or mask.shape != rows.shape[:1]:
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected ({rows.shape[0]},), one per token, got {got}")
    return mask.to(rows.device)


def _mean_prob(routing, mask, gate):
    """Mean gate of each expert over the tokens that count, (E,)."""
    _require(routing, "mean_prob")
    if mask is None:
        return routing.mean_prob
    logits, kept = _masked(routing, mask)
    gates = torch.where(kept, gate_values(logits, gate), 0)
    return gates.sum(0) / kept.sum().clamp(min=1)


def counts_of(routing, mask):
    """Slots per expert among the tokens that count, (E,) int64."""
    if mask is None:
        return routing.counts
    ids, E = routing.indices, routing.num_experts
    kept = (_fitted(mask, ids)[:, None] != 0) & (ids >= 0) & (ids < E)
    bins = torch.where(kept, ids, E).long().flatten()
    counts = torch.zeros(E + 1, dtype=torch.int64, device=ids.device)
    return counts.index_add(0, bins, torch.ones_like(bins))[:E]


def _load(routing, mask=None):
    """Share of the slots that each expert received, (E,); zeros without tokens."""
    counts = counts_of(routing, mask).to(routing.weights.dtype)
    return counts / counts.sum().clamp(min=1)


def _cv_squared(values):
    mean = values.mean()
    return (values - mean).square().mean() / torch.where(mean == 0, 1, mean).square()


def _ran(model):
    """{path: (layer, its record)} of the layers that have run in this thread."""
    records_of = {
        name: (layer, records.record_of(layer)) for name, layer in layers_of(model).items()
    }
    ran = {name: pair for name, pair in records_of.items() if pair[1].last is not None}
    if not ran:
        raise RuntimeError("model: expected a forward to have run, but no layer has a routing yet")
    return ran


@torch.no_grad()
def _statistics(run):
    routing, mask = run.routing, run.tokens.counted()
    load = _load(routing, mask).cpu()
    utilisation = load * routing.num_experts
    return {
        "load": load,
        "utilisation": utilisation,
        "max_over_mean": float(utilisation.max()),
        "dead": torch.nonzero(load == 0).flatten().tolist(),
        "entropy": None if routing.logits is None else float(router_entropy(routing, mask)),
    }
