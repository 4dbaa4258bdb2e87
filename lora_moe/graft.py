"""graft_weights: merging coefficients from the compatibility of a layer's experts, after Graft.

Letters: E experts, R rank rows of all experts together, L layers.
"""

from __future__ import annotations

from reprlib import repr as brief

import torch
from torch import nn

from .layers import LoraMoeLinear
from .merging import mergeable_layers


@torch.no_grad()
def graft_weights(
    model: nn.Module, *, local: float = 0.5, compatibility: float = 1.0, total: float = 1.0
) -> dict[str, torch.Tensor]:
    """c_le = total * q_le / sum_f q_lf,   q_le = a_le^local * h_e^(1 - local) * k_le^compatibility.

    With the update M_le = s_e B_e A_e of expert e in layer l:

        a_le  its share of the layer's updates, |M_le| / sum_f |M_lf|  (Frobenius norms)
        h_e   how evenly it changes the model: entropy of |M_le|^2 over the layers, divided by log L
        k_le  its compatibility: mean of (1 + cos(M_le, M_lf)) / 2 over the other experts

    No product (D_out, D_in) is computed.  Pass the result to merge: `merge(model, graft_weights(model))`.

    Args:
        model: a model with experts that merge supports.
        local: in [0, 1]: interpolates between the global (0) and the local (1) signal.
        compatibility: exponent of k, at least 0; 0 ignores it.
        total: sum of each layer's coefficients.
    Returns:
        {module path: (E,) fp64}; experts with a zero update get 0.
    Raises:
        ValueError: if an option is invalid, or merge does not support the model.
    Source:
        Graft (arXiv 2506.23940): "local functional attribution", "global information-theoretic signals" and
        a compatibility score between experts.  The abstract gives no formulas: a, h, k and their product
        are this package's interpretation, and k compares updates where Graft compares activations.
    """
    if not 0 <= local <= 1:
        raise ValueError(f"local: expected a number in [0, 1], got {brief(local)}")
    if not 0 <= compatibility < float("inf"):
        raise ValueError(
            f"compatibility: expected a number of at least 0, got {brief(compatibility)}"
        )
    layers = mergeable_layers(model)
    counts = {layer.config.num_experts for layer in layers.values()}
    if len(counts) > 1:
        raise ValueError(f"model: expected equally many experts per layer, got {sorted(counts)}")
    grams = {path: gram(layer) for path, layer in layers.items()}
    norms = torch.stack([G.diagonal().clamp(min=0).sqrt() for G in grams.values()])  # (L, E)
    spread = _spread(norms.square())  # (E,)
    found = {}
    for (path, G), norm in zip(grams.items(), norms):
        share = norm / norm.sum().clamp(min=torch.finfo(norm.dtype).tiny)
        q = share**local * spread ** (1 - local) * _compatibility(G, norm) ** compatibility
        q = torch.where(norm > 0, q, 0)
        found[path] = total * q / q.sum() if q.sum() > 0 else q
    return found


def gram(layer: LoraMoeLinear) -> torch.Tensor:
    """Inner products <M_e, M_f> of all pairs of updates, (E, E), fp64 on the CPU."""
    config = layer.config
    ids = torch.arange(config.num_experts).repeat_interleave(torch.tensor(config.ranks))  # (R,)
    A, B = (t.detach().double().cpu() for t in (layer.lora_A, layer.lora_B))
    A = A.repeat(config.num_experts, 1) if config.shared_a else A
    B = B * torch.tensor(layer.scales, dtype=torch.float64)[ids, None]
    of_expert = nn.functional.one_hot(ids, config.num_experts).double()  # (R, E)
    return of_expert.T @ ((A @ A.T) * (B @ B.T)) @ of_expert


def _spread(energy):
    """Normalized entropy over the layers of each expert's energy (L, E); 1 if uniform or L = 1."""
    if len(energy) == 1:
        return torch.ones_like(energy[0])
    p = energy / energy.sum(0).clamp(min=torch.finfo(energy.dtype).tiny)
    return -torch.xlogy(p, p).sum(0) / torch.log(torch.tensor(float(len(energy))))


def _compatibility(G, norm):
    """(E,), in [0, 1]; arbitrary for experts with a zero update."""
    E = len(norm)
    if E == 1:
        return torch.ones_like(norm)
    scale = norm.clamp(min=torch.finfo(norm.dtype).tiny)
    cosine = (G / scale[:, None] / scale).clamp(-1, 1)
    return ((1 + cosine).sum(1) - (1 + cosine.diagonal())) / (2 * (E - 1))
