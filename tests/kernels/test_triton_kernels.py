"""The Triton kernels, operator by operator, against the reference in fp64 on the same rounded inputs.

On a GPU they run compiled; otherwise they are interpreted, and also run under the sanitizer.
"""

from __future__ import annotations

import pytest
import torch

from lora_moe import reference
from lora_moe.plan import PLANS

from ..support import eager, slots
from ..support.cases import CASES, in_double, sample
from ..support.compare import assert_accurate
from ..support.triton_calls import (
    DEVICE,
    ROUTING,
    WIDE,
    all_needed,
    check_routed_lora,
    compare,
    cotangents,
    experts,
    in_fp64,
    kernels,
    noise,
    on_device,
    routed,
    router,
    saved_as,
    some,
    watched,
)

pytest.importorskip("triton")
every_case = pytest.mark.parametrize("case", CASES + WIDE, ids=lambda case: case.name)
LONG = ("wide: dense", "segmented")  # 257 slots in a row, interpreted: a minute and a half
by_other_plans = pytest.mark.parametrize(
    ("case", "plan"),
    [
        pytest.param(case, plan, marks=[pytest.mark.nightly] * ((case.name, plan) == LONG))
        for case in CASES + WIDE
        for plan in PLANS[1:]
    ],
    ids=lambda value: getattr(value, "name", value),
)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)


@every_dtype
@every_case
def test_routed_lora(case, dtype):
    """Forward, then backward with the gradients of all outputs of the routing."""
    check_routed_lora(case, dtype, "rank_dense")


@by_other_plans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_routed_lora_by_other_plans(case, dtype, plan):
    check_routed_lora(case, dtype, plan)


def nasty_routing(case):
    """Empty slots, ids out of range, repeated ids, negative and zero weights."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, case.E, (case.T, case.K), generator=g, dtype=torch.int32)
    ids[: case.T // 2, -1] = ids[: case.T // 2, 0]
    ids[case.T // 2 : case.T // 2 + 1] = torch.iinfo(torch.int32).min
    weights = noise(case.T, case.K, seed=4)
    weights[-1:] = 0
    return ids, weights


@every_dtype
@every_case
def test_grouped_lora(case, dtype):
    check_grouped_lora(case, dtype, "rank_dense")


@by_other_plans
def test_grouped_lora_by_other_plans(case, plan):
    check_grouped_lora(case, torch.bfloat16, plan)


def check_grouped_lora(case, dtype, plan):
    inputs, (ids, weights) = sample(case, dtype), nasty_routing(case)
    dy = noise(case.T, case.D_out, dtype=dtype)
    inputs |= {"ids": ids, "weights": weights, "dy": dy}

    def forward(ops, v, *plan):
        return ops.grouped_lora(
            v["x"], v["lora_A"], v["lora_B"], v["base"], v["ids"], v["weights"], v["scaling"],
            *experts(case), *slots.none(ops), *plan,
        )  # fmt: skip

    def backward(ops, v, s, *rest):
        return ops.grouped_lora_backward(
            v["dy"], v["x"], v["lora_A"], v["lora_B"], s, v["ids"], v["weights"], v["scaling"],
            *experts(case), *slots.none(ops), *rest,
        )  # fmt: skip

    exact = {k: v.double() if k != "ids" and v is not None else v for k, v in inputs.items()}
    with watched():
        got = forward(kernels, on_device(inputs), plan)
    y, s = forward(reference, exact)
    saved = saved_as(plan, s, ids, case)
    compare(["y", "S"], got, [y, saved], dtype)
    with watched():
        saved = saved.float().to(DEVICE)
        got = backward(kernels, on_device(inputs), saved, *all_needed(plan=plan))
    want = backward(reference, exact, s.float().double())
    compare(["dx", "dweights", "da", "db"], got, want, dtype, case.T)


@slots.every_call
def test_slots(case, dtype, form):
    """Rows apart or summed, forward and backward."""
    with watched():
        slots.check(kernels, case, form, dtype, DEVICE)


@slots.every_form
@pytest.mark.parametrize(
    "check", [slots.check_layouts, slots.check_needs, slots.check_empty], ids=lambda f: f.__name__
)
def test_contract_of_slots(check, form):
    with watched():
        check(kernels, form, DEVICE)


@every_case
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_router_topk(case, adapters):
    """The router alone, with weights in fp32 or x's dtype; backward with each output left out."""
    v = sample(case, torch.bfloat16)
    v["router_weight"] = v["router_weight"].to(adapters)

    def forward(ops, v):
        return ops.router_topk(
            v["x"], v["router_weight"], v["bias"], v["router_bias"], *router(case)
        )

    with watched():
        got = forward(kernels, on_device(v))
    want = forward(reference, in_double(v))
    compare(ROUTING, got, want, torch.float32)
    ids, weights, logits = want[0], want[1].float(), want[2].float()
    for missing in range(5):  # 4: none is missing
        aux = [None if i == missing else a for i, a in enumerate(cotangents(case))]
        given = [*aux, ids, weights, logits]
        with watched():
            got = kernels.router_topk_backward(
                *(a if a is None else a.to(DEVICE) for a in given), case.gate, case.renormalize
            )
        want = reference.router_topk_backward(*in_fp64(given), case.gate, case.renormalize)
        compare(["logits"], [got], [want], torch.float32)


@every_dtype
@some("odd", "one past a tile", "no rows", "wide: 1024 ranks", "one expert")
def test_matmuls(case, dtype):
    """shrink, expand with one and two pairs, and wgrad on an fp32 H."""
    v = sample(case, dtype)
    x, w, a, b, base = (v[k] for k in ("x", "router_weight", "lora_A", "lora_B", "base"))
    h, h2 = noise(case.T, case.R), noise(case.T, case.E)
    b2 = noise(case.E, case.D_out)
    calls = [
        ("shrink", (x, a, w), ["S", "logits"]),
        ("shrink", (x, a, None), ["S", "logits"]),
        ("expand", (h, b, None, None, base), ["y"]),
        ("expand", (h, b, h2, b2, None), ["y"]),
        ("expand", (h, b, h2, b2.to(dtype), base), ["y"]),
        ("wgrad", (h, x), ["S"]),  # an fp32 H is not rounded
    ]
    for name, args, names in calls:
        more = (dtype,) if name == "expand" else ()
        with watched():
            got = getattr(kernels, name)(*(v if v is None else v.to(DEVICE) for v in args), *more)
        more = (torch.float64,) if name == "expand" else ()
        want = getattr(reference, name)(*in_fp64(args), *more)
        got, want = ((v,) if isinstance(v, torch.Tensor) else v for v in (got, want))
        compare(names, got, want, dtype)


@every_dtype
@some("long", "wide", "unequal ranks")
def test_no_worse_than_eager(case, dtype):
    """The error of y is at most that of plain PyTorch in the same dtype."""
    inputs = sample(case, dtype)
    got = routed(kernels, on_device(inputs), case, "rank_dense")
    ids = got[1].cpu()
    want = eager.routed_lora(in_double(inputs), case, ids)[0]
    assert_accurate("y", got[0].cpu(), want, eager.routed_lora(inputs, case, ids)[0])


@some("odd", "tiles fit", "many experts", "no rows", "wide: 1024 ranks")
def test_route_logits(case):
    """Decisions equal those of router_topk bit for bit; the given logits are not changed."""
    v = on_device(sample(case))
    *want, counts = kernels.router_topk(
        v["x"], v["router_weight"], v["bias"], v["router_bias"], *router(case)
    )
    logits = want.pop(2)
    before = logits.clone()
    with watched():
        got = kernels.route_logits(logits, v["bias"], *router(case))
    for a, b in zip(got, [*want, counts], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(logits, before)
