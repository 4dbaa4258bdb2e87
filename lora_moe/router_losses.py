"""Losses of a single Routing, computed without one-hot encodings.

Each has an argument `mask` (T,), nonzero for tokens that count: padding does not contribute to means, loads
or gradients, even if its rows are NaN.  losses.router_loss applies them to a model.

Letters: T tokens, E experts, K slots per token, B sequences.
"""

from __future__ import annotations

import torch
from torch import nn

from .reference import gate_values
from .routing import Routing


def load_balance_loss(
    routing: Routing, mask: torch.Tensor | None = None, gate: str = "softmax"
) -> torch.Tensor:
    """E * sum_e f_e P_e, with f_e the share of slots of expert e and P_e its mean gate: 1 if balanced.

    The gradient flows through P.  Sigmoid gates do not sum to one; the balanced value is then E * mean(P).

    Args:
        routing: from a router.
        mask: (T,), nonzero for the tokens that count; None counts all.
        gate: the router's gate, "softmax" or "sigmoid"; only used with a mask.
    Returns:
        0-dim, fp32 (fp64).
    Raises:
        ValueError: if the routing is not from a router, or the mask is not (T,).
    Source: Fedus et al. 2021 (Switch Transformers), arXiv 2101.03961, eq. 4-6, over K slots.
    """
    return routing.num_experts * (load_of(routing, mask) * _mean_prob(routing, mask, gate)).sum()


def straight_through_balance(
    routing: Routing, mask: torch.Tensor | None = None, gate: str = "softmax"
) -> torch.Tensor:
    """load_balance_loss with a gradient through f too, as if f_e were P_e.

    Args, Returns, Raises: as in load_balance_loss.
    Source: Chen et al. 2024 (LLaVA-MoLE), arXiv 2401.16160, whose one-hot choice is straight-through.
    """
    P = _mean_prob(routing, mask, gate)
    through_f = routing.num_experts * (P.detach() * (P - P.detach())).sum()  # 0
    return load_balance_loss(routing, mask, gate) + through_f


def cv_squared(
    routing: Routing, mask: torch.Tensor | None = None, gate: str = "softmax"
) -> torch.Tensor:
    """Var(P) / Mean(P)^2, with P_e the mean gate of e: 0 if balanced, E - 1 if collapsed.

    P is computed before the top-k, so it is smooth; with K = E it is the source's importance.

    Args, Returns, Raises: as in load_balance_loss.
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

    p is the softmax of the logits.  The loss balances tokens among the experts of a sequence's type, and
    gives these more tokens than the others.

    Args:
        routing: from a router, for B sequences of equal length.
        expert_types: (E,) integers.
        sample_types: (B,) integers.
        delta: in [0, 1).
        mask: (T,), nonzero for the tokens that count; None counts all.
    Returns:
        0-dim, fp32 (fp64).
    Raises:
        ValueError: if the routing is not from a router, or T is not a multiple of B.
    Source: Dou et al. 2024 (LoRAMoE), arXiv 2312.09979, eq. 6-8.
    """
    T, B = _require(routing, "logits").shape[0], sample_types.shape[0]
    if B == 0 or T % B:
        raise ValueError(f"sample_types: expected one per sequence of {T} tokens, got {B}")
    logits, kept = _masked(routing, mask)
    gates = torch.where(kept, torch.softmax(logits, 1), 0).unflatten(0, (B, -1)).sum(1)  # (B, E)
    agree = (sample_types[:, None] == expert_types[None]).to(gates)  # (B, E) on the gates' device
    return _cv_squared(gates * (1 - delta + 2 * delta * agree))


def z_loss(routing: Routing, mask: torch.Tensor | None = None) -> torch.Tensor:
    """mean_t logsumexp(logits_t)^2: keeps the router's logits small.

    Args:
        routing: from a router.
        mask: (T,), nonzero for the tokens that count; None counts all.
    Raises:
        ValueError: if the routing is not from a router, or the mask is not (T,).
    Source: Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, eq. 5.
    """
    lse = _require(routing, "lse")
    if mask is None:
        return lse.square().sum() / max(lse.shape[0], 1)
    logits, kept = _masked(routing, mask)
    lse = torch.where(kept[:, 0], torch.logsumexp(logits, 1), 0)
    return lse.square().sum() / kept.sum().clamp(min=1)


def router_entropy(routing: Routing, mask: torch.Tensor | None = None) -> torch.Tensor:
    """mean_t of -sum_e p_te log p_te in nats, with p the softmax: log E if uniform, 0 if certain.

    Args, Raises: as in z_loss.
    """
    logits, kept = _masked(routing, mask)
    logp = torch.log_softmax(logits, 1)
    entropy = torch.where(kept[:, 0], -(logp.exp() * logp).sum(1), 0)
    return entropy.sum() / kept.sum().clamp(min=1)


def label_loss(
    routing: Routing, labels: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """mean_t of lse_t - logits_t[label_t]: cross-entropy between the router and expert labels.

    Args:
        routing: from a router.
        labels: integer expert ids: (T,) one per token, or (B,) one per sequence of T / B tokens; -100
            excludes the token.
        mask: (T,), nonzero for the tokens that count; None counts all.
    Raises:
        ValueError: if the routing is not from a router, the mask is not (T,), or T is not a multiple of
            the number of labels.
    Source: Xu et al. 2024 (MeteoRA), arXiv 2405.13053.
    """
    logits, kept = _masked(routing, mask)
    T, given = logits.shape[0], labels.numel()
    if labels.dim() != 1 or given == 0 or T % given:
        raise ValueError(f"labels: expected one per token or sequence of {T} tokens, got {given}")
    labels = labels.to(logits.device).long().repeat_interleave(T // given)
    labels = torch.where(kept[:, 0], labels, -100)
    counted = (labels != -100).sum().clamp(min=1)
    return nn.functional.cross_entropy(logits, labels, reduction="sum") / counted


def _require(routing, field) -> torch.Tensor:
    value = getattr(routing, field)
    if value is None:
        raise ValueError(f"routing: expected {field} from a router, got a routing without it")
    return value


def _masked(routing, mask):
    """The logits, zero for tokens that do not count, and (T, 1) bool whether a token counts.

    Excluded rows are replaced instead of multiplied by zero, since they may be NaN.
    """
    logits = _require(routing, "logits")
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


def load_of(routing, mask=None):
    """Share of the slots that each expert received, (E,); zeros without tokens."""
    counts = counts_of(routing, mask).to(routing.weights.dtype)
    return counts / counts.sum().clamp(min=1)


def _cv_squared(values):
    mean = values.mean()
    return (values - mean).square().mean() / torch.where(mean == 0, 1, mean).square()
