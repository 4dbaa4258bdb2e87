"""The Triton kernels bit by bit: ties, order of programs, batches, inf and NaN."""

from __future__ import annotations

import importlib
import random
from dataclasses import replace

import pytest
import torch

from lora_moe import reference
from lora_moe.plan import PLANS

from ..support import slots
from ..support.cases import BY_NAME, sample
from ..support.compare import assert_accurate
from ..support.triton_calls import (
    DEVICE,
    INTERPRETED,
    all_needed,
    cotangents,
    experts,
    host,
    kernels,
    noise,
    on_device,
    routed,
    routed_backward,
    router_file,
    some,
)

pytest.importorskip("triton")
every_plan = pytest.mark.parametrize("plan", PLANS)


@slots.every_form
def test_slots_in_any_order_of_programs(monkeypatch, form):
    case = replace(BY_NAME["one past a tile"], T=18)
    v = slots.on(slots.inputs_of(case, form, torch.float32), DEVICE)
    first = slots.results(kernels, v, case, form)
    if INTERPRETED:
        shuffle_programs(monkeypatch)
    assert all(map(torch.equal, slots.results(kernels, v, case, form), first))


@every_plan
@some("tiles fit", "unequal ranks", "shared A", "wide: 1024 ranks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tokens_bits_do_not_depend_on_its_batch(case, dtype, plan):
    """In the interpreter not even on the batch's size class."""
    case = replace(case, T=70)
    v = on_device(sample(case, dtype))
    full = routed(kernels, v, case, plan)
    for rows in (slice(0, 1), slice(40, 57)) if INTERPRETED else (slice(0, 65),):
        part = {**v, "x": v["x"][rows], "base": v["base"][rows]}
        got = routed(kernels, part, case, plan)
        for i in (0, 1, 2, 3, 5, 7):  # all but the statistics of the batch
            assert torch.equal(got[i], full[i][rows])


@some("tiles fit", "unequal ranks", "wide: 1024 ranks")
def test_bits_do_not_depend_on_the_number_of_programs(monkeypatch, case):
    """Programs with fewer tokens or ranks than their tile has rows, as the multiprocessors make them."""
    case = replace(case, T=40)
    v, found = on_device(sample(case, torch.bfloat16)), []
    for multiprocessors in (1, 7, 40):
        for name in ("shrink", "rank_dense"):
            module = importlib.import_module(f"lora_moe.triton_kernels.{name}")
            monkeypatch.setattr(module, "multiprocessors", lambda device, n=multiprocessors: n)
        found.append(routed(kernels, v, case, "rank_dense"))
    for other in found[1:]:
        for i in (0, 1, 2, 3, 5, 6, 7):  # all but the mean over tokens
            assert torch.equal(other[i], found[0][i])


@every_plan
def test_deterministic_in_any_order_of_programs(monkeypatch, plan):
    case = BY_NAME["one past a tile"]
    v, dy = on_device(sample(case)), noise(case.T, case.D_out).to(DEVICE)

    def everything():
        out = routed(kernels, v, case, plan)
        saved = [out[i] for i in (1, 2, 3, 7)]
        aux = [a.to(DEVICE) for a in cotangents(case)]
        return *out, *routed_backward(kernels, v, case, dy, aux, saved, *all_needed(plan=plan))

    first = everything()
    if INTERPRETED:
        shuffle_programs(monkeypatch)
    for a, b in zip(first, everything()):
        assert torch.equal(a, b)


@some("odd", "one past a tile", "unequal ranks", "shared A", "wide: unequal")
def test_plans_agree(case):
    """Outputs and gradients in fp32 agree within 4 u, the router's decisions exactly."""
    v, dy = on_device(sample(case)), noise(case.T, case.D_out).to(DEVICE)

    def everything(plan):
        *out, s = routed(kernels, v, case, plan)
        aux = [a.to(DEVICE) for a in cotangents(case)]
        saved = *out[1:4], s
        return *out, *routed_backward(kernels, v, case, dy, aux, saved, *all_needed(plan=plan))

    first, *others = [host(everything(plan)) for plan in PLANS]
    for other in others:
        for a, b in zip(first, other, strict=True):
            if a.is_floating_point():
                assert_accurate("plans", b, a, dtype=torch.float32, units=4)
            else:
                assert torch.equal(a, b)


def shuffle_programs(monkeypatch):
    from triton.runtime import interpreter

    order = random.Random(0)

    def shuffled(n, *more):
        if more:  # of a static loop in a kernel
            return range(n, *more)
        programs = list(range(n))
        order.shuffle(programs)
        return programs

    monkeypatch.setattr(interpreter, "range", shuffled, raising=False)


@some("tiles fit", "many experts")
def test_ties_go_to_the_lower_id(case):
    v = on_device(sample(case, torch.bfloat16))
    v["router_weight"] = torch.zeros_like(v["router_weight"])
    ids = routed(kernels, {**v, "bias": None, "router_bias": None}, case, "rank_dense")[1]
    assert torch.equal(ids.cpu(), torch.arange(case.K, dtype=torch.int32).expand(case.T, -1))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@some("tiles fit", "wide: unequal")
def test_a_non_finite_row_affects_no_other(case, value, gate):
    """Its ids are valid and distinct; all other tokens keep their bits."""
    case = replace(case, gate=gate)
    v = on_device(sample(case))
    clean = routed(kernels, v, case, "rank_dense")
    v["x"] = v["x"].clone()
    v["x"][3, 1] = value
    got = routed(kernels, v, case, "rank_dense")
    assert all(0 <= i < case.E for i in got[1][3].tolist())
    assert len(set(got[1][3].tolist())) == case.K
    others = [t for t in range(case.T) if t != 3]
    for i in (0, 1, 2, 3, 5, 7):
        assert torch.equal(got[i][others], clean[i][others])


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_special_logits_as_in_torch(gate):
    """inf, -inf and NaN, alone and combined, with ties."""
    values = [0.0, 1.0, -2.0, torch.inf, -torch.inf, torch.nan]
    rows = torch.cartesian_prod(*[torch.tensor(values)] * 3)
    options = router_file.gate_options(2, gate, True)
    got = host(router_file.decide(rows.to(DEVICE), router_file.NO_BIASES, options))
    p = reference.gate_values(rows, gate)
    assert torch.equal(got[0].long(), reference.select_topk(p, 2))
    weights = p.gather(1, got[0].long())
    weights = weights / torch.where((z := weights.sum(1, keepdim=True)) == 0, 1, z)
    assert torch.allclose(got[1], weights, equal_nan=True, rtol=1e-6, atol=0)
    assert torch.allclose(got[4], torch.logsumexp(rows, 1), equal_nan=True, rtol=1e-6)


@some("tiles fit", "wide: unequal")
def test_nothing_leaks_from_experts_not_picked(case):
    """NaN in the A of an expert without tokens reaches neither y nor the gradients of other experts."""
    v = on_device(sample(case))
    ids = torch.ones(case.T, 1, dtype=torch.int32, device=DEVICE)
    weights = torch.ones(case.T, 1, device=DEVICE)
    rows = slice(*case.offsets[2:4])
    args = ids, weights, v["scaling"], *experts(case), "none"
    clean, _ = kernels.grouped_lora(v["x"], v["lora_A"], v["lora_B"], None, *args, "rank_dense")
    a = v["lora_A"].clone()
    a[rows] = torch.nan
    y, s = kernels.grouped_lora(v["x"], a, v["lora_B"], None, *args, "rank_dense")
    assert torch.equal(y, clean)
    dy = noise(case.T, case.D_out).to(DEVICE)
    grads = kernels.grouped_lora_backward(
        dy, v["x"], v["lora_A"], v["lora_B"], s, *args, *all_needed()
    )
    assert all(g.isfinite().all() for g in grads)


def test_nothing_added_leaves_base_bit_identical():
    case = BY_NAME["long"]
    v = on_device(sample(case, torch.bfloat16))
    ids = torch.full((case.T, 2), -1, dtype=torch.int32, device=DEVICE)
    weights = torch.ones(case.T, 2, device=DEVICE)
    for change in ({}, {"scaling": 0 * v["scaling"]}, {"lora_B": 0 * v["lora_B"]}):
        u, i = {**v, **change}, ids + 3 if change else ids
        y, _ = kernels.grouped_lora(
            u["x"], u["lora_A"], u["lora_B"], u["base"], i, weights, u["scaling"],
            *experts(case), "none", "rank_dense",
        )  # fmt: skip
        assert torch.equal(y, v["base"])
