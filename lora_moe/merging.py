"""merge: merges experts with fixed coefficients into the base's weight or into one LoRA.

    W <- W0 + sum_e c_e s_e B_e A_e          c_e: the caller's coefficients, the same for every token

A routed mixture differs per token, so it is not a matrix and cannot be merged.

Letters: E experts, R rank rows of all experts together, r one expert's rank, D_in and D_out the linear's
sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from reprlib import repr as brief

import torch
from torch import nn

from .config import FFN
from .fields import MAX_RANK
from .injection import place, remove
from .layers import LoraMoeLinear
from .mergeable import Weight
from .reference import accumulator
from .routing import Routing
from .safefile import raise_all
from .sharded import is_sharded, is_stepped_by_zero, unwrapped
from .steering import layers_of

Coefficients = Sequence[float] | torch.Tensor | Routing


@torch.no_grad()
def merge(
    model: nn.Module,
    weights: Coefficients | Mapping[str, Coefficients],
    *,
    into: str = "base",
    r: int | None = None,
) -> nn.Module:
    """Merge  sum_e c_e s_e B_e A_e  of every layer into its base's weight, or into one LoRA.

    The merged model computes the same as the mixture with gates c for every token.  into="base" rounds to
    the base's dtype and removes the experts, as remove() does; into="lora" leaves one expert per layer,
    for to_peft or further training.

    c_e = 1 for a single expert merges its LoRA alone; other coefficients give the sum of scaled task
    vectors of R-MTLLMF and task arithmetic, theta_0 + sum_t c_t tau_t.  graft_weights computes
    coefficients from the experts.

    Args:
        model: a model with experts from inject, neither wrapped nor sharded.
        weights: c (E,) as numbers, a tensor, or a Routing that is the same for all tokens; or
            {module path: c} for every layer.
        into: "base" or "lora".
        r: rank of the LoRA; if the experts have more rows, they are approximated by singular value
            decomposition.  None is exact: the rank is the sum of the ranks of experts with nonzero c_e, or
            the rank of a shared A.
    Returns:
        The same model.
    Raises:
        ValueError: if a Routing differs between tokens; there are not E coefficients, or one is not
            finite; the model is wrapped, or has no experts or PEFT's; a layer is not a sum of B_e A_e
            (a configuration with a middle); or, with into="base", the base is quantized, tied, sharded,
            offloaded or of an unknown class, or the result is not finite.  Every problem is listed, and the
            model is unchanged.
    Source:
        task arithmetic, arXiv 2212.04089; R-MTLLMF, arXiv 2411.18220 (task vectors with coefficients).
    """
    if into not in ("base", "lora"):
        raise ValueError(f"into: expected 'base' or 'lora', got {brief(into)}")
    layers = mergeable_layers(model)
    given = coefficients(layers, weights)
    if into == "lora":
        merged = {layer: _one_lora(layer, given[path], r) for path, layer in layers.items()}
        place(model, merged)
        return model
    if r is not None:
        raise ValueError(f"r: expected None with into='base', got {brief(r)}")
    targets = {path: Weight(model, path, layer) for path, layer in layers.items()}
    problems = [f"{path}: {target.refusal}" for path, target in targets.items() if target.refusal]
    raise_all("model: expected weights that experts can be merged into", problems)
    for write in (False, True):  # first check that everything is finite
        for path, layer in layers.items():
            targets[path].add(delta(layer, given[path]), write)
    return remove(model)


def mergeable_layers(model: nn.Module) -> dict[str, LoraMoeLinear]:
    if unwrapped(model) is not model:
        raise ValueError(
            f"model: expected the unwrapped model, got a {type(model).__name__}: merge the inner model in"
            " one process"
        )
    layers = layers_of(model)
    problems = []
    for path, layer in layers.items():
        if layer is model:
            problems.append("the model itself is the layer; pass a module that contains it")
        elif layer.adapter_name is not None:
            problems.append(f"{path}: a PEFT adapter; save_adapter and load_adapter convert it")
        elif any(is_sharded(t) or is_stepped_by_zero(t) for t in layer.adapter_state().values()):
            problems.append(f"{path}: its experts are sharded; merge in one process")
        elif layer.config.target_parameters:
            problems.append(f"{path}: the model's own experts; save with to_peft and merge in PEFT")
        elif layer.config.placement == FFN:
            problems.append(f"{path}: experts that are FFNs, whose sum is not an FFN")
        elif layer.config.middle is not None:
            kind = type(layer.config.middle).__name__
            problems.append(f"{path}: with its middle {kind} it is not a sum of B_e A_e")
    raise_all("model: expected experts that can be merged", problems)
    return layers


def coefficients(layers: Mapping[str, LoraMoeLinear], weights) -> dict[str, torch.Tensor]:
    """{path: c (E,), fp64 on the CPU} for each layer; see merge."""
    if isinstance(weights, Mapping):
        unknown, missing = sorted(weights.keys() - layers.keys()), layers.keys() - weights.keys()
        if unknown or missing:
            raise ValueError(
                f"weights: expected one entry per layer, got unknown {brief(unknown)}, missing"
                f" {brief(sorted(missing))}"
            )
    else:
        weights = dict.fromkeys(layers, weights)
    return {
        path: _coefficients(weights[path], layer.config.num_experts)
        for path, layer in layers.items()
    }


def _coefficients(weights, E):
    if isinstance(weights, Routing):
        weights = _constant(weights)
    try:
        c = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"weights: expected {E} numbers, one per expert, or a constant Routing, got {brief(weights)};"
            " per-token routing cannot be merged"
        ) from None
    if c.shape != (E,) or not torch.isfinite(c).all():
        raise ValueError(f"weights: expected {E} finite numbers, got {brief(c.tolist())}")
    return c


def _constant(routing):
    """c (E,) of a routing that is the same for all tokens."""
    ids, weights = routing.indices.long().cpu(), routing.weights.detach().double().cpu()
    c = torch.zeros(len(ids), routing.num_experts, dtype=torch.float64)
    c.scatter_add_(1, ids.clamp(min=0), weights.masked_fill(ids < 0, 0))
    if not len(c) or (c != c[0]).any():
        raise ValueError(
            "weights: expected a Routing that is the same for all tokens, got one that differs: per-token"
            " routing cannot be merged; pass one weight per expert, or keep the experts"
        )
    return c[0]


# --- the matrices ------------------------------------------------------------------------------------


def rows(layer: LoraMoeLinear, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R', D_in) and B (R', D_out), at least fp32, with  sum_e c_e s_e B_e A_e = B^T A.

    R' is r with a shared A, else the number of rows of experts with nonzero c_e.
    """
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    dtype = accumulator(torch.promote_types(A.dtype, B.dtype))
    A, B = A.to(dtype), B.to(dtype)
    ranks = torch.tensor(layer.config.ranks)
    scale = c * torch.tensor(layer.scales, dtype=c.dtype)
    by_row = scale.repeat_interleave(ranks).to(B)
    B = B * by_row[:, None]  # (R, D_out)
    if layer.config.shared_a:
        return A, B.unflatten(0, (layer.config.num_experts, -1)).sum(0)
    kept = (c != 0).repeat_interleave(ranks).to(B.device)
    return A[kept], B[kept]


def delta(layer: LoraMoeLinear, c: torch.Tensor) -> torch.Tensor:
    """sum_e c_e s_e B_e A_e, (D_out, D_in), at least fp32."""
    A, B = rows(layer, c)
    return B.T @ A


def _one_lora(layer, c, r):
    """A replacement layer with one expert, gate 1 and scale 1."""
    A, B = rows(layer, c)
    if r is not None and (type(r) is not int or not 1 <= r <= MAX_RANK):
        raise ValueError(f"r: expected an integer in [1, {MAX_RANK}] or None, got {brief(r)}")
    if r is None and len(A) > MAX_RANK:
        raise ValueError(f"r: expected a rank of at most {MAX_RANK} for {len(A)} rows, got None")
    if r is not None and r < len(A):
        A, B = truncated(A, B, r)
    if not len(A):
        A, B = layer.lora_A.new_zeros(1, layer.in_features), B.new_zeros(1, layer.out_features)
    one = LoraMoeLinear(layer.base_layer, layer.config.one_expert(len(A), float(len(A))))
    one.lora_A.copy_(A)
    one.lora_B.copy_(B)
    one.train(layer.training)
    for name in ("lora_A", "lora_B"):
        getattr(one, name).requires_grad_(getattr(layer, name).requires_grad)
    return one


def truncated(A: torch.Tensor, B: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of the best rank-r approximation of B^T A in the Frobenius norm.

    A (R, D_in), B (R, D_out) -> (r, D_in), (r, D_out).  The (D_out, D_in) product is never computed.
    """
    qa, ra = torch.linalg.qr(A.double().T)  # A = ra^T qa^T
    qb, rb = torch.linalg.qr(B.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T)
    root = s[:r].sqrt()
    a = (root[:, None] * vh[:r]) @ qa.T
    b = (qb @ (u[:, :r] * root)).T
    return a.to(A.dtype), b.to(B.dtype)
