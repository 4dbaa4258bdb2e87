"""Bitwise guarantees on every backend: adding nothing, ties, NaN in other rows, batches, repeats."""

from __future__ import annotations

import math

import pytest
import torch

from lora_moe import Routing
from lora_moe import functional as F

from ..support.cases import BY_NAME, CASES, leaves, sample, some_cases
from ..support.functions import (
    BACKEND,
    PARAMETERS,
    assert_same_bits,
    cotangents,
    every_dtype,
    experts_of,
    gradients,
    pinned,
    routed,
    routing_outputs,
)


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_bf16_numbers_that_are_not_subnormal_are_kept(rows):
    """A CPU's bf16 dot may flush inputs below 2^-126 to zero; all other products and sums are exact."""
    tiny = 2.0**-126
    x = torch.full((rows, 64), tiny, dtype=torch.bfloat16)
    x[:, ::2] *= 1.5
    w = torch.zeros(2, 64, dtype=torch.bfloat16)
    a = torch.zeros(4, 64, dtype=torch.bfloat16)
    a[:, 0], a[1:, 1], a[2:, 2], a[3, 4:8] = 1.0, 2.0, -1.0, 4.0
    b = torch.eye(4, dtype=torch.bfloat16)
    y, _ = F.routed_lora(x, w, a, b, 1, rank_offsets=2, scaling=1.0)
    want = (x.double() @ a.double()[:2].T) @ b.double()[:2]
    assert torch.equal(y.double(), want)
    s, _ = F.shrink(x, a)
    assert torch.equal(s.double(), x.double() @ a.double().T)
    below = x / 4  # subnormal: kept or flushed to zero
    s, _ = F.shrink(below, a)
    assert (s.double() - below.double() @ a.double().T).abs().max() <= tiny * 32


def test_tokens_without_experts_equal_base_bit_for_bit():
    for case in CASES:
        v = sample(case)
        if v["base"] is None:
            continue
        none = Routing.from_ids(torch.full((case.T, 2), -1), num_experts=case.E)
        y = F.grouped_lora(
            v["x"], v["lora_A"], v["lora_B"], none, base=v["base"], **experts_of(case)
        )
        assert torch.equal(y, v["base"])
        assert case.T == 0 or y.data_ptr() != v["base"].data_ptr()


@every_dtype
@pytest.mark.parametrize("zero", ["scaling", "lora_B"])
def test_nothing_added_equals_base_bit_for_bit(zero, dtype):
    case = BY_NAME["long"]
    v = sample(case, dtype)
    v[zero] = torch.zeros_like(v[zero])
    assert torch.equal(routed(v, case)[0], v["base"])


def test_a_nan_row_stays_alone():
    case = BY_NAME["tiles fit"]
    v = sample(case)
    clean, routing = routed(v, case)
    for bad in (torch.nan, torch.inf):
        v["x"][11, 3] = bad
        y, dirty = routed(v, case)
        others = torch.arange(case.T) != 11
        assert torch.equal(y[others], clean[others])
        assert torch.equal(dirty.indices[others], routing.indices[others])
        ids = dirty.indices[11].tolist()
        assert len(set(ids)) == case.K and all(0 <= e < case.E for e in ids)
        assert y[11].isnan().all()


def test_nan_in_unused_experts_does_not_reach_y_or_gradients():
    case = BY_NAME["tiles fit"]
    v = sample(case)
    ids = torch.randint(0, 4, (case.T, case.K), generator=torch.Generator().manual_seed(0))
    routing = Routing.from_ids(ids, num_experts=case.E)

    def run(lora_A):
        leaf = {
            **v,
            "lora_A": lora_A.clone().requires_grad_(),
            "x": v["x"].clone().requires_grad_(),
        }
        y = F.grouped_lora(
            leaf["x"], leaf["lora_A"], v["lora_B"], routing, base=v["base"], rank_offsets=case.ranks
        )
        return y, *torch.autograd.grad(y.sum(), leaf["lora_A"])

    poisoned = v["lora_A"].clone()
    poisoned[case.offsets[4] :] = torch.nan
    for got, want in zip(run(poisoned), run(v["lora_A"]), strict=True):
        assert torch.equal(got, want)


def test_exact_ties_go_to_the_lower_id():
    x, w = torch.ones(5, 8), torch.ones(6, 8)
    for bias in (None, torch.tensor([0.0, 0, 1, 0, 1, 0])):
        routing = F.router_topk(x, w, 3, bias=bias)
        want = [0, 1, 2] if bias is None else [2, 4, 0]
        assert routing.indices.tolist() == [want] * 5


@every_dtype
@some_cases("long", "several chunks", "unequal ranks", "shared A", "many experts")
def test_a_tokens_bits_do_not_depend_on_its_batch(case, dtype):
    with pinned():
        check_batch_invariance(case, sample(case, dtype))
        if dtype in (torch.bfloat16, torch.float16):  # few tokens round adapters on reading
            check_batch_invariance(case, sample(case, dtype, adapter_dtype=torch.float32))


def check_batch_invariance(case, v):
    whole, routing = routed(v, case)
    picks = [0, case.T // 2, case.T - 1]
    parts = [torch.arange(t, t + 1) for t in picks] + [torch.arange(0, case.T, 3)]
    for rows in parts:
        y, part = routed({**v, "x": v["x"][rows], "base": v["base"][rows]}, case)
        assert torch.equal(part.indices, routing.indices[rows])
        assert_same_bits(part.weights, routing.weights[rows])
        assert_same_bits(y, whole[rows])


@pytest.mark.parametrize("T", [1, 5, 100])
@every_dtype
def test_zero_experts_leave_the_base_as_it_is(dtype, T):
    """This includes subnormal numbers, which the CPU's own rounding to bf16 would flush."""
    case = BY_NAME["long"]
    v = sample(case, dtype)
    tiny = torch.finfo(dtype).smallest_normal / 4
    base = v["base"][:T].clone()
    base[:, ::3] = tiny
    base[:, 1::7] = -tiny
    y, _ = routed({**v, "x": v["x"][:T], "base": base, "lora_B": v["lora_B"] * 0}, case)
    assert_same_bits(y, base)


@every_dtype
def test_same_bits_over_repeats_and_thread_counts(dtype):
    case = BY_NAME["long"]

    def run():
        inputs = leaves(sample(case, dtype), *PARAMETERS)
        y, routing = routed(inputs, case)
        outputs = list(routing_outputs(y, routing).values())
        return [*outputs, *gradients(outputs, cotangents(outputs), inputs, PARAMETERS).values()]

    threads = torch.get_num_threads()
    want = run()
    try:
        for n in (1, 2, 4) if BACKEND == "cpp" else (threads,):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True)), n
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("scaling", [2, 1.5, torch.tensor([0.5, 2.0, 1.0])], ids=str)
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)], ids=str)
def test_calls_without_a_graph_give_the_same_bits(shape, scaling):
    x, w, a, b = (torch.randn(s) for s in (shape, (3, 24), (12, 24), (12, 16)))
    base = torch.randn(*shape[:-1], 16)

    def run(scaling):
        return F.routed_lora(x, w, a, b, 2, rank_offsets=4, scaling=scaling, base=base)

    with torch.no_grad():
        y, routing = run(scaling)
        for bad in (math.nan, math.inf, True, "2", [1.0]):
            with pytest.raises(
                ValueError, match="scaling: expected a finite float or 3 finite floats"
            ):
                run(bad)
    b.requires_grad_()
    want, want_routing = run(scaling)
    assert y.shape == want.shape
    assert torch.equal(y, want)
    assert all(torch.equal(one, two) for one, two in zip(routing, want_routing, strict=True))


@pytest.mark.skipif(
    BACKEND not in ("cpp", "reference"), reason="GPU kernels need a row to launch on"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [5, 70])
def test_sums_over_nothing(tokens, dtype):
    """No slots, rank rows or columns: results are the base or zeros, never uninitialized memory."""
    x, base = torch.randn(tokens, 24, dtype=dtype), torch.randn(tokens, 16, dtype=dtype)
    a, b = (torch.randn(4, d, dtype=dtype, requires_grad=True) for d in (24, 16))
    nobody = Routing.from_ids(torch.empty(tokens, 0, dtype=torch.int64), num_experts=1)
    y = F.grouped_lora(x, a, b, nobody, rank_offsets=4, shared_a=True, base=base)
    assert torch.equal(y, base)
    assert all(g.eq(0).all() for g in torch.autograd.grad(y.sum(), (a, b)))

    assert torch.equal(F.expand(torch.empty(tokens, 0), b[:0], base), base)
    leaf = x.clone().requires_grad_()
    empty, logits = F.shrink(leaf, a[:0], torch.randn(3, 24, dtype=dtype))
    (dx,) = torch.autograd.grad(empty.sum() + 0 * logits.sum(), leaf)
    assert dx.eq(0).all()

    sums, logits = F.shrink(x[:, :0], a[:, :0], torch.empty(3, 0, dtype=dtype))
    assert sums.eq(0).all() and sums.shape == (tokens, 4)
    assert logits.eq(0).all() and logits.shape == (tokens, 3)


def test_saved_shapes_do_not_depend_on_the_routing():
    case = BY_NAME["tiles fit"]

    def saved(skew):
        shapes = []
        v = leaves(sample(case), *PARAMETERS)
        w = v["router_weight"] * 0 if skew else v["router_weight"]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t
        ):
            routed({**v, "router_weight": w}, case)
        return shapes[-9:]

    assert saved(False) == saved(True)


@pytest.mark.parametrize("T", [1, 5, 64, 65])
@pytest.mark.parametrize("shared_a", [False, True], ids=["private-a", "shared-a"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_adapters_equal_adapters_rounded_first(dtype, shared_a, T):
    """With few tokens, only the picked experts' rows are rounded; the bits equal those of rounding all."""
    g = torch.Generator().manual_seed(T)
    E, r, D_in, D_out = 6, 5, 97, 131
    x, base = (torch.randn(T, d, generator=g).to(dtype) for d in (D_in, D_out))
    w = torch.randn(E, D_in, generator=g) * 0.1
    a = torch.randn(r if shared_a else E * r, D_in, generator=g)
    b = torch.randn(E * r, D_out, generator=g)
    ids = torch.randint(-1, E, (T, 2), generator=g)
    options = {"rank_offsets": r, "shared_a": shared_a, "base": base}
    narrow = a.to(dtype), b.to(dtype)
    wide, _ = F.routed_lora(x, w, a, b, 2, **options)
    assert torch.equal(wide, F.routed_lora(x, w, *narrow, 2, **options)[0])
    given = Routing.from_ids(ids, num_experts=E)
    wide = F.grouped_lora(x, a, b, given, **options)
    assert torch.equal(wide, F.grouped_lora(x, *narrow, given, **options))
