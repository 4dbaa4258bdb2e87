"""Shared by the formulas: a case, the experts' matrices, the mixture of a token."""

from collections.abc import Callable
from typing import NamedTuple

import torch

TASKS, MASK = torch.tensor([2, 0]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
B, L, D_IN, D_OUT = *MASK.shape, 6, 5


class Case(NamedTuple):
    make: Callable  # takes keywords of LoraMoeConfig
    formula: Callable
    tasks: bool = False
    sequence: bool = False  # one decision for several tokens


def experts(p, E, r, shared=False):
    """A_e (r, D_in) and B_e (D_out, r) of each expert; r is one rank or a rank per expert."""
    ranks = [r] * E if isinstance(r, int) else r
    A = [p["lora_A"]] * E if shared else p["lora_A"].split(ranks)
    return [(a, b.T) for a, b in zip(A, p["lora_B"].split(ranks), strict=True)]


def mixture(x, gates, pairs, scales):
    """sum_e g_e s_e B_e A_e x of one token; gates is {e: g}."""
    y = x.new_zeros(pairs[0][1].shape[0])
    for e, g in gates.items():
        A, B_e = pairs[e]
        y = y + g * scales[e] * (B_e @ (A @ x))
    return y


def by_token(x, decide, pairs, scales):
    rows = [
        [mixture(x[b, i], decide(x[b, i], b), pairs, scales) for i in range(L)] for b in range(B)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def best(p, k):
    return sorted(range(len(p)), key=lambda e: -float(p[e].detach()))[:k]


def shares(p, ids):
    total = sum(p[e] for e in ids)
    return {e: p[e] / total for e in ids}
