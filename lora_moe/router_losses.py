"""Losses of one Routing: functions of its tensors, with no one-hot of the choice.

Each takes `mask` (T,), nonzero for the tokens that count: padding has no part in a mean, a load or a
gradient, whatever its rows hold.  Over a model they are called by losses.router_loss.

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
    return routing.num_experts * (load_of(routing, mask) * _mean_prob(routing, mask, gate)).sum()


def straight_through_balance(
    routing: Routing, mask: torch.Tensor | None = None, gate: str = "softmax"
) -> torch.Tensor:
    """load_balance_loss whose gradient flows through f as well, as if f_e were P_e.

    Args, Returns, Raises: as load_balance_loss.
    Source: Chen et al. 2024 (LLaVA-MoLE), arXiv 2401.16160, whose one-hot choice is straight-through.
    """
    P = _mean_prob(routing, mask, gate)
    through_f = routing.num_experts * (P.detach() * (P - P.detach())).sum()  # 0
    return load_balance_loss(routing, mask, gate) + through_f


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
        ValueError: the caller supplied the routing, or the mask is not (T,).
    Source: Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, eq. 5.
    """
    lse = _require(routing, "lse")
    if mask is None:
        return lse.square().sum() / max(lse.shape[0], 1)
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
        labels: integers, an expert each: (T,) one per token, or (B,) one per sequence of T / B tokens;
            -100 leaves the token out.
        mask: (T,), nonzero for the tokens that count; None counts all.
    Raises:
        ValueError: the caller supplied the routing, the mask is not (T,), or T is no multiple of the
            labels.
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
        raise ValueError(f"routing: expected {field} from a router, got a routing by the caller")
    return value


def _masked(routing, mask):
    """The logits, zero where a token does not count, and (T, 1) bool whether it does.

    Rows that do not count may hold NaN: they are replaced, not multiplied by zero.
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
