"""Test inputs: named shapes, scaled so that outputs are of order one, with mixed signs.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch


@dataclass(frozen=True)
class Case:
    name: str
    T: int
    E: int
    K: int
    ranks: int | tuple[int, ...]
    D_in: int
    D_out: int
    gate: str = "softmax"
    renormalize: bool = True
    shared_a: bool = False
    with_bias: bool = False
    with_router_bias: bool = False
    with_base: bool = True
    skew: float = 0.0  # pulls every token toward expert 0

    @property
    def offsets(self) -> list[int]:
        ranks = [self.ranks] * self.E if isinstance(self.ranks, int) else self.ranks
        return [0, *accumulate(ranks)]

    @property
    def R(self) -> int:
        return self.offsets[-1]

    @property
    def options(self) -> dict:
        return {"gate": self.gate, "renormalize": self.renormalize}


CASES = [
    Case("odd", 7, 3, 2, 3, 15, 17, with_router_bias=True),
    Case("one token", 1, 8, 2, 8, 97, 128, gate="sigmoid"),
    Case("tiles fit", 64, 8, 2, 8, 128, 128, with_bias=True),
    Case(
        "one past a tile",
        65,
        7,
        3,
        17,
        129,
        65,
        with_base=False,
        renormalize=False,
        with_router_bias=True,
    ),
    Case("most experts idle", 5, 64, 1, 4, 64, 48, renormalize=False),
    Case("one takes all", 33, 8, 1, 12, 48, 97, renormalize=False, skew=50.0),
    Case("no rows", 0, 4, 2, 8, 16, 24),
    Case("wide", 31, 8, 2, 8, 600, 97, gate="sigmoid", renormalize=False, with_router_bias=True),
    Case("long", 257, 8, 2, 8, 256, 40),
    Case("several chunks", 70, 3, 2, (65, 12, 1), 600, 515, with_bias=True),
    Case(
        "unequal ranks",
        33,
        4,
        2,
        (1, 2, 24, 7),
        40,
        33,
        gate="sigmoid",
        with_bias=True,
        with_router_bias=True,
    ),
    Case("shared A", 17, 8, 2, 16, 64, 48, shared_a=True, with_router_bias=True),
    Case("many experts", 17, 257, 3, 1, 16, 15, with_router_bias=True),
    Case("dense", 16, 7, 7, 4, 32, 16, with_base=False),
    Case("one expert", 15, 1, 1, 2, 17, 1, gate="sigmoid", renormalize=False),
    Case("large rank", 16, 2, 1, 128, 97, 64, renormalize=False),
]
BY_NAME = {case.name: case for case in CASES}

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def some_cases(*names):
    return pytest.mark.parametrize("case", [BY_NAME[n] for n in names], ids=lambda case: case.name)


def sample(case: Case, dtype=torch.float32, seed: int = 0, adapter_dtype=None) -> dict:
    """x, router_weight, lora_A, lora_B, base, bias, scaling, router_bias; RMS of the output about 1."""
    g = torch.Generator().manual_seed(seed)
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=g, dtype=torch.float64) * scale

    rank = case.R / case.E
    rows_a = int(rank) if case.shared_a else case.R
    w = normal(case.E, case.D_in, scale=case.D_in**-0.5)
    x = normal(case.T, case.D_in)
    if case.skew:  # a constant feature that only expert 0's router row reads
        x[:, 0] = 1
        w[0, 0] += case.skew
    adapter = adapter_dtype or dtype
    return {
        "x": x.to(dtype),
        "router_weight": w.to(acc),
        "lora_A": normal(rows_a, case.D_in, scale=case.D_in**-0.5).to(adapter),
        "lora_B": normal(case.R, case.D_out, scale=(rank * case.K) ** -0.5).to(adapter),
        "base": normal(case.T, case.D_out, scale=0.5).to(dtype) if case.with_base else None,
        "bias": torch.rand(case.E, generator=g).to(acc) * 0.2 if case.with_bias else None,
        "scaling": (torch.rand(case.E, generator=g) + 1.0).to(acc),
        "router_bias": normal(case.E, scale=0.5).to(acc) if case.with_router_bias else None,
    }


def in_double(inputs: dict) -> dict:
    """The same rounded numbers in fp64, the operands of the reference result."""
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def leaves(inputs: dict, *names) -> dict:
    """A copy whose named tensors require gradients."""
    return {
        k: v.detach().clone().requires_grad_() if k in names and v is not None else v
        for k, v in inputs.items()
    }
