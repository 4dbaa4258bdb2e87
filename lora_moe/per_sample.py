"""Mixes experts once per sample: if all tokens of a sample share their gates, its mixture is one LoRA.

    y_t = base_t + (sum_e g_be s_e B_e) (sum_e g_be A_e) x_t       t a token of sample b

functional.grouped_lora takes the samples' LoRAs as experts, one per token, with the usual kernels and
gradients; autograd differentiates the mixing product.  With a shared A only B is mixed, and y equals that of
per-token gating.

Letters: B samples, T tokens, E experts, r one expert's rank.
"""

from __future__ import annotations

import math

import torch

from . import backend, plan
from . import functional as F
from .routing import Routing
from .rows import adapter_rows, dense_gates


def pays(layer, x: torch.Tensor, samples: Routing | None) -> bool:
    """Whether mixing per sample is faster than gating per token (see plan.mixes); False without samples."""
    if samples is None or not _is_number(samples.indices.shape[0]):
        return False
    config, sizes = layer.config, (layer.in_features, layer.out_features)
    serving, tokens = backend.serving(x.device.type), math.prod(x.shape[:-1])
    shape = tokens, samples.indices.shape[0], config.num_experts, config.ranks[0], *sizes
    return plan.mixes(serving, *shape, x.dtype, config.shared_a)


def _is_number(rows) -> bool:
    """False for a symbolic number: the number of LoRAs must be static in a compiled graph."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return has_static_value(rows)
    return type(rows) is int


def add_mixed(
    layer,
    x: torch.Tensor,
    base: torch.Tensor,
    samples: Routing,
    cores: torch.Tensor | None = None,
    base_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """base + the mixed LoRA of each token's sample, (..., D_out); base for samples without experts.

    Args:
        samples: B rows, each for T / B consecutive tokens.
        cores: (B, r, r), C_b between a shared A and the mixed B; None is the identity.
        base_weight: as in functional.grouped_lora.
    """
    A, B = adapter_rows(layer)
    gates = dense_gates(samples, layer.config.num_experts)  # (B, E)
    if not layer.config.shared_a:
        A = _mixed(gates, A).flatten(0, 1)  # (B r, D_in)
    mixed_b = _mixed(gates * layer.scaling, B)  # (B, r, D_out)
    if cores is not None:
        mixed_b = cores.transpose(1, 2).to(mixed_b) @ mixed_b
    return F.grouped_lora(
        x, A, mixed_b.flatten(0, 1), _own_lora(samples, x), rank_offsets=mixed_b.shape[1],
        shared_a=layer.config.shared_a, base=base, base_weight=base_weight,
    )  # fmt: skip


def _mixed(gates, rows):
    """sum_e g_be M_e per sample.  gates (B, E), rows (E r, D) -> (B, r, D)"""
    (samples, E), D = gates.shape, rows.shape[1]
    wide = torch.promote_types(gates.dtype, rows.dtype)
    return (gates.to(wide) @ rows.to(wide).reshape(E, -1)).view(samples, -1, D)


def _own_lora(samples, x):
    """Route each token to its sample's LoRA with weight 1, or to none if the sample has no expert."""
    rows, tokens = samples.indices.shape[0], math.prod(x.shape[:-1])
    each, device = tokens // rows, x.device
    used = (samples.indices >= 0).any(1)  # (B,)
    ids = torch.where(used, torch.arange(rows, dtype=torch.int32, device=device), -1)
    ids = ids[:, None].expand(rows, each).reshape(tokens, 1)
    return Routing(ids, torch.ones(tokens, 1, device=device), used.long() * each)
