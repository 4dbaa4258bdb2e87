"""The Triton kernels on shapes that fit no tile: each pair of factor values occurs in some case.

Forward and gradients of the public function through the launchers, against the formula in fp64.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import random

import pytest
import torch

from lora_moe import plan as plans

from ..support import eager
from ..support.cases import Case, in_double, leaves, sample
from ..support.compare import UNIT, assert_accurate, relative_error
from ..support.functions import PARAMETERS, cotangents, gradients, routed
from ..support.interpreter import interpreting
from ..support.through import through

pytest.importorskip("triton")
INTERPRETED = not torch.cuda.is_available()
with interpreting() if INTERPRETED else contextlib.nullcontext():
    kernels = importlib.import_module("lora_moe.triton_kernels")

UNEQUAL = (5, 1, 17, 2)  # repeated to one rank per expert
MOST_RANKS = 2100  # of all experts: a few of them take the interpreter milliseconds
# Wrong results differ by 1 % or more, 1.7e5 and 2.6 u; correct sums that cancel reach these bounds
UNITS = {torch.float32: 256, torch.bfloat16: 2.0}
FACTORS = {
    "plan": plans.PLANS,
    "dtype": (torch.float32, torch.bfloat16),
    "E": (1, 3, 5, 64, 257, 1025),
    "K": (1, 2, 3, 4, 5, 6, 7, 8),
    "rank": (1, 2, 3, 7, 8, 16, 17, 24, 64, 128, UNEQUAL),
    "T": (0, 1, 2, 15, 16, 17, 33, 64, 300),
    "D": ((1, 15), (17, 16), (97, 33), (130, 1)),
}


def possible(case):
    ranks = case["rank"]
    total = case["E"] * (sum(UNEQUAL) / 4 if ranks == UNEQUAL else ranks)
    busy = case["T"] * case["E"] > 4200  # takes minutes in the interpreter
    return case["K"] <= case["E"] and total <= MOST_RANKS and not busy


def covering_cases():
    """Greedy: out of some random cases, pick the one with the most pairs not covered yet."""
    choose, names = random.Random(0), list(FACTORS)

    def pairs(case):
        return set(itertools.combinations([(n, str(case[n])) for n in names], 2))

    def draw():
        while True:
            case = {name: choose.choice(values) for name, values in FACTORS.items()}
            if possible(case):
                return case

    missing = set().union(*(pairs(draw()) for _ in range(5000)))
    while missing:
        best = max((draw() for _ in range(60)), key=lambda case: len(pairs(case) & missing))
        if found := pairs(best) & missing:
            missing -= found
            yield best


def name(values):
    return "-".join(str(v).removeprefix("torch.") for v in values.values())


@pytest.mark.parametrize("values", covering_cases(), ids=name)
def test_sweep(values):
    E, ranks, (D_in, D_out) = values["E"], values["rank"], values["D"]
    if ranks == UNEQUAL:
        ranks = (UNEQUAL * E)[:E]
    case = Case("", values["T"], E, values["K"], ranks, D_in, D_out, with_bias=E > 3)
    dtype = values["dtype"]
    inputs = sample(case, dtype)
    v = leaves(inputs, *PARAMETERS)
    with through(kernels), plans.override(values["plan"]):
        y, routing = routed(v, case)
        dys = [d.to(dtype).double() for d in cotangents([y])]  # rounded as the kernels read them
        got = gradients([y], dys, v, PARAMETERS)
    ids = routing.indices
    assert all(len(set(row)) == case.K and 0 <= min(row) <= max(row) < E for row in ids.tolist())
    exact = leaves(in_double(inputs), *PARAMETERS)
    want = eager.routed_lora(exact, case, ids)[0]
    expected = gradients([want], dys, exact, PARAMETERS)
    plain = leaves(inputs, *PARAMETERS)
    usual = eager.routed_lora(plain, case, ids)[0]
    other = gradients([usual], dys, plain, PARAMETERS)

    def check(name, out, truth, eagers):  # eager's error bounds ill-conditioned sums, as D = 1
        units = max(UNITS[dtype], 1.5 * relative_error(eagers, truth) / UNIT[dtype])
        assert_accurate(name, out, truth, dtype=dtype, units=units)

    check("y", y, want, usual)
    for key in got:
        if case.K == 1 and key == "router_weight":  # w = p / p = 1: its gradient is rounding only
            assert (got[key].abs() <= 1e-3 * max(1.0, float(dys[0].norm()))).all()
        else:
            check(f"d{key}", got[key], expected[key], other[key])
