"""Router losses and statistics: functions of a Routing's tensors, with no one-hot of the choice.

Letters: T tokens, E experts, K slots a token, B sequences.
"""

from __future__ import annotations

import torch
from torch import nn

from .inject import layers_of
from .routing import Routing


def load_balance_loss(routing: Routing) -> torch.Tensor:
    """E * sum_e f_e P_e, f_e the share of slots that went to e, P_e the mean gate: 1 when balanced.

    The gradient flows through P.  Sigmoid gates do not sum to one: balanced is then E * mean(P).

    Args:
        routing: from a router.
    Returns:
        0-dim, fp32 (fp64).
    Raises:
        ValueError: the caller supplied the routing, so there is no router to balance.
    Source: Fedus et al. 2021 (Switch Transformers), arXiv 2101.03961, eq. 4-6, over K slots.
    """
    _require(routing, "mean_prob")
    return routing.num_experts * (_load(routing) * routing.mean_prob).sum()


def cv_squared(routing: Routing) -> torch.Tensor:
    """Var(P) / Mean(P)^2, P_e the mean gate of e: 0 when balanced, E - 1 when collapsed.

    P is taken before the top-k, so that it is smooth; with K = E it is the source's importance.

    Args:
        routing: from a router.
    Returns:
        0-dim, fp32 (fp64).
    Raises:
        ValueError: the caller supplied the routing.
    Source: Shazeer et al. 2017 (Sparsely-Gated MoE), arXiv 1701.06538, eq. 6-7.
    """
    _require(routing, "mean_prob")
    return _cv_squared(routing.mean_prob)


def localized_cv_squared(
    routing: Routing, expert_types: torch.Tensor, sample_types: torch.Tensor, delta: float = 0.1
) -> torch.Tensor:
    """CV^2 of  Z_be = (1 + delta if the types of b and e agree else 1 - delta) * sum_{t in b} p_te.

    p is the softmax of the logits.  Experts of a sequence's type are led to take more of it than
    the others, balanced among themselves.

    Args:
        routing: from a router, for B sequences of equal length.
        expert_types: (E,) integers.
        sample_types: (B,) integers.
        delta: in [0, 1).
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
    gates = torch.softmax(routing.logits, 1).unflatten(0, (B, -1)).sum(1)  # (B, E)
    agree = sample_types[:, None] == expert_types[None]
    return _cv_squared(gates * torch.where(agree, 1 + delta, 1 - delta))


def z_loss(routing: Routing) -> torch.Tensor:
    """mean_t logsumexp(logits_t)^2: keeps the router's logits small.

    Raises:
        ValueError: the caller supplied the routing.
    Source: Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, eq. 5.
    """
    _require(routing, "lse")
    return routing.lse.square().sum() / max(routing.lse.shape[0], 1)


def router_entropy(routing: Routing) -> torch.Tensor:
    """mean_t of -sum_e p_te log p_te in nats, p the softmax: log E when undecided, 0 when sure.

    Raises:
        ValueError: the caller supplied the routing.
    """
    _require(routing, "logits")
    logits, lse = routing.logits, routing.lse
    entropy = lse - (torch.exp(logits - lse[:, None]) * logits).sum(1)
    return entropy.sum() / max(entropy.shape[0], 1)


def label_loss(routing: Routing, labels: torch.Tensor) -> torch.Tensor:
    """mean_t of lse_t - logits_t[label_t]: cross-entropy that teaches the router the right expert.

    Args:
        routing: from a router.
        labels: (T,) integers, an expert each; -100 leaves the token out.
    Raises:
        ValueError: the caller supplied the routing.
    Source: Xu et al. 2024 (MeteoRA), arXiv 2405.13053.
    """
    _require(routing, "logits")
    return nn.functional.cross_entropy(routing.logits, labels.long())


def aux_loss(model: nn.Module) -> torch.Tensor:
    """Mean over layers of  balance_coef * load_balance_loss + z_coef * z_loss  of the last forward.

    Add it to the loss before backward, in each step of a gradient accumulation.  Layers whose
    routing the caller supplied have no router and do not count.  A layer that a step leaves out (an
    image encoder in a step without images) still shows the step before, whose graph is gone:
    set_routing(model) before the forward makes it forget.

    Args:
        model: with experts in it (see inject).
    Returns:
        0-dim tensor, differentiable with respect to routers and activations.
    Raises:
        ValueError: the model has no experts.
        RuntimeError: no forward has run yet, or it ran without a graph although the model trains,
            as inside a reentrant activation checkpoint: use_reentrant=False keeps the gradient.
    """
    layers = _ran(model)
    losses = [_layer_loss(*item) for item in layers.items() if item[1].routing.lse is not None]
    if not losses:
        return next(iter(layers.values())).routing.weights.new_zeros(())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def _layer_loss(name, layer):
    routing, config = layer.routing, layer.config
    trains = layer.training and layer.router_weight.requires_grad and torch.is_grad_enabled()
    if trains and not routing.lse.requires_grad:
        raise RuntimeError(
            f"aux_loss: expected a forward with a graph, but {name} ran without one"
            " (under no_grad, or in a reentrant checkpoint: pass use_reentrant=False)"
        )
    balance = config.balance_coef * load_balance_loss(routing)
    return balance + config.z_coef * z_loss(routing)


def router_stats(model: nn.Module) -> dict[str, dict]:
    """What each layer's last forward did with its experts, on the CPU; waits for the device.

    Returns:
        {module path: statistics} of the layers that have run, with the statistics
            load           (E,), share of the slots that went to each expert
            utilisation    (E,), load / ideal = load * E
            max_over_mean  float, the largest utilisation
            dead           ids of the experts that got no token
            entropy        router_entropy in nats, None where the caller supplied the routing
    Raises:
        ValueError: the model has no experts.
        RuntimeError: no forward has run yet.
    """
    return {name: _statistics(layer.routing) for name, layer in _ran(model).items()}


@torch.no_grad()
def update_selection_bias(model: nn.Module, rate: float = 0.001) -> None:
    """b += rate * sign(mean(counts) - counts): balance without a loss, once after each step.

    Only layers with selection_bias whose router ran last.  The counts are this process's own; DDP's
    broadcast of buffers makes those of rank 0 decide.

    Raises:
        ValueError: the model has no experts, or none of them has a selection_bias.
        RuntimeError: no forward has run yet.
    Source: Wang et al. 2024 (Auxiliary-loss-free load balancing), arXiv 2408.15664, algorithm 1.
    """
    layers = [layer for layer in _ran(model).values() if layer.selection_bias is not None]
    if not layers:
        raise ValueError("model: expected layers with selection_bias=True, got none")
    for layer in layers:
        if layer.routing.logits is not None:
            counts = layer.routing.counts.to(layer.selection_bias.dtype)
            layer.selection_bias += rate * torch.sign(counts.mean() - counts)


def _require(routing, field):
    if getattr(routing, field) is None:
        raise ValueError(f"routing: expected {field} from a router, got a routing by the caller")


def _load(routing):
    """Share of the slots that each expert received, (E,); zeros without tokens."""
    counts = routing.counts.to(routing.weights.dtype)
    return counts / counts.sum().clamp(min=1)


def _cv_squared(values):
    mean = values.mean()
    return (values - mean).square().mean() / torch.where(mean == 0, 1, mean).square()


def _ran(model):
    ran = {name: layer for name, layer in layers_of(model).items() if layer.routing is not None}
    if not ran:
        raise RuntimeError("model: expected a forward to have run, but no layer has a routing yet")
    return ran


@torch.no_grad()
def _statistics(routing):
    load = _load(routing).cpu()
    utilisation = load * routing.num_experts
    return {
        "load": load,
        "utilisation": utilisation,
        "max_over_mean": float(utilisation.max()),
        "dead": torch.nonzero(load == 0).flatten().tolist(),
        "entropy": None if routing.logits is None else float(router_entropy(routing)),
    }
