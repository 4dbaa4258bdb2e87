"""Routing: each token's experts and weights, and the router statistics that the losses need.

Letters: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import autograd, checks

_ops = torch.ops.lora_moe


class Routing(NamedTuple):
    """The routing decision for T tokens, as tensors; fp32, or fp64 if x is fp64.

    indices    (T, K) int32, expert ids; -1 is an empty slot, and repeated ids add up.
    weights    (T, K), the gate of each slot; differentiable.
    counts     (E,) int64, slots per expert.
    logits     (T, E), router outputs; differentiable.
    mean_prob  (E,), mean over tokens of the gate values (softmax or sigmoid); differentiable.
    lse        (T,), logsumexp of the logits; differentiable.

    The last three are None if the routing is not from a router.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    logits: torch.Tensor | None = None
    mean_prob: torch.Tensor | None = None
    lse: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]

    @staticmethod
    def from_ids(indices, weights=None, *, num_experts: int) -> Routing:
        """A routing to given experts, for example by task, segment or tenant.

        Args:
            indices: (T,) or (T, K) integer expert ids in [0, num_experts), -1 for none.
            weights: same shape, floating; 1 for every slot by default.
            num_experts: E.
        Raises:
            ValueError, TypeError: if a shape or dtype is invalid.  The operators check the ids on a
                CPU and mask them on a GPU, which avoids a host synchronization.
        """
        _expect_integer("num_experts", num_experts)
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"indices: expected integers, got {indices.dtype}")
        if indices.dim() not in (1, 2):
            raise ValueError(f"indices: expected (T,) or (T, K), got {tuple(indices.shape)}")
        if weights is None:
            weights = torch.ones(indices.shape, device=indices.device)
        if weights.shape != indices.shape:
            raise ValueError(
                f"weights: expected indices' shape {tuple(indices.shape)},"
                f" got {tuple(weights.shape)}"
            )
        if indices.dim() == 1:
            indices, weights = indices[:, None], weights[:, None]
        # clamp, since ids beyond int32 could wrap around into valid ones, as could -2 in uint8
        ids = indices.long().clamp(-2, num_experts).int()
        return Routing(ids, _at_least_fp32(weights), _count(ids, num_experts))

    @staticmethod
    def from_gates(gates: torch.Tensor) -> Routing:
        """A dense routing from gates (T, E), differentiable: every token uses every expert."""
        if gates.dim() != 2 or not gates.is_floating_point():
            raise ValueError(
                f"gates: expected floating (T, E), got {gates.dtype} {tuple(gates.shape)}"
            )
        T, E = gates.shape
        ids = torch.arange(E, dtype=torch.int32, device=gates.device).expand(T, E)
        counts = torch.full((E,), T, dtype=torch.int64, device=gates.device)
        return Routing(ids.contiguous(), _at_least_fp32(gates), counts)

    @staticmethod
    def from_logits(
        logits: torch.Tensor,
        top_k: int,
        *,
        gate: str = "softmax",
        renormalize: bool = True,
        bias: torch.Tensor | None = None,
        top_p: float | None = None,
        threshold: float | None = None,
    ) -> Routing:
        """The routing of router_topk from the logits of any router:  p = gate(logits),  weights = p[ids].

        Args:
            logits: (..., E), floating; differentiable.
            top_k, gate, renormalize, bias, top_p, threshold: as in functional.router_topk.
        Returns:
            Routing with all fields set; logits as (T, E), at least fp32.
        Raises:
            ValueError, TypeError: if an argument is invalid.
        """
        logits = checks.logits(logits)
        checks.decision(logits, logits.shape[1], top_k, gate, bias, like="logits")
        options = top_k, gate, bool(renormalize), *checks.sparsity(top_p, threshold, gate)
        bias = checks.selection(bias, logits)
        checks.first_order(logits)
        if torch.is_grad_enabled() and logits.requires_grad:
            out = autograd.RouteLogits.apply(logits, bias, *options)
        else:
            out = _ops.route_logits(logits.contiguous(), bias, *options)
        indices, weights, mean_prob, lse, counts = out
        return Routing(indices, weights, counts, logits, mean_prob, lse)

    def repeat(self, n: int) -> Routing:
        """Expand one row per sequence to its n tokens: row t becomes rows t*n .. t*n + n - 1."""
        return self._spread(n, lambda rows: rows.repeat_interleave(n, 0))

    def tile(self, n: int) -> Routing:
        """Expand one row per sequence to tokens ordered as (L, B): row b becomes rows b, B + b, ..."""
        return self._spread(n, lambda rows: rows.repeat(n, *[1] * (rows.dim() - 1)))

    def _spread(self, n, spread):
        _expect_integer("n", n, least=0)
        indices, weights, logits, lse = (
            None if v is None else spread(v)
            for v in (self.indices, self.weights, self.logits, self.lse)
        )
        return Routing(indices, weights, self.counts * n, logits, self.mean_prob, lse)


def _expect_integer(name, value, least=1):
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def _at_least_fp32(weights):
    return weights if weights.dtype == torch.float64 else weights.float()


def _count(ids, num_experts):
    """Slots per expert; empty and invalid ids go to an extra bin that is cut off."""
    valid = (ids >= 0) & (ids < num_experts)
    bins = torch.where(valid, ids, num_experts).long().flatten()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.index_add(0, bins, torch.ones_like(bins))[:num_experts].clone()
