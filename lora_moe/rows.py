"""Helpers of routers and middles: adapter rows, expanding samples to tokens, dense gates."""

from __future__ import annotations

import math

import torch

from .routing import Routing


def adapter_rows(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A and lora_B; rows of frozen experts get no gradient (with shared_a only those of lora_B)."""
    A, B = layer.lora_A, layer.lora_B
    if not layer.frozen:
        return A, B
    moves = torch.ones(B.shape[0], 1, dtype=torch.bool, device=B.device)
    for e in layer.frozen:
        moves[layer.offsets[e] : layer.offsets[e + 1]] = False
    B = torch.where(moves, B, B.detach())
    return A if layer.config.shared_a else torch.where(moves, A, A.detach()), B


def for_tokens(samples: Routing, x: torch.Tensor) -> Routing:
    """Expand one row per sample to one per token of x."""
    rows = samples.indices.shape[0]
    return samples.repeat(math.prod(x.shape[:-1]) // rows if rows else 0)


def dense_gates(routing: Routing, E: int) -> torch.Tensor:
    """(T, E), each expert's weight summed over its slots."""
    ids = routing.indices.long()
    valid = (ids >= 0) & (ids < E)
    weights = torch.where(valid, routing.weights, 0)
    zero = weights.new_zeros(ids.shape[0], E)
    return zero.scatter_add(1, torch.where(valid, ids, 0), weights)
