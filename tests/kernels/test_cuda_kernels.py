"""The CUDA kernels, operator by operator, against the reference in fp64 on the same rounded inputs.

Without a GPU they are compiled for the CPU with one fiber per thread; every test runs the threads of a block
first to last and last to first.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import pytest
import torch

from lora_moe import plan, reference

from ..support import eager, slots
from ..support.cases import BY_NAME, CASES, in_double, sample
from ..support.compare import assert_accurate
from ..support.cuda_calls import (
    WIDE,
    all_needed,
    cotangents,
    grouped,
    grouped_backward,
    grouped_sample,
    noise,
    routed,
    routed_backward,
    router,
    some,
)
from ..support.cuda_shim import build
from ..support.through import NAMES, results, through

pytestmark = pytest.mark.skipif(
    shutil.which(build.COMPILER) is None or sys.platform != "linux", reason="needs a C++ compiler"
)
every_case = pytest.mark.parametrize("case", CASES + WIDE, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
# in units of the dtype: 16-bit results include one rounding of H or dS and one of the output
UNITS = {torch.float32: 12, torch.bfloat16: 0.85, torch.float16: 0.85}
ROUTING = ["indices", "weights", "logits", "mean_prob", "lse", "counts"]


def compare(names, got, want, dtype, tokens=16):
    """Integers exactly, the router's numbers as fp32, the others as their dtype allows.

    The bound is wider where few numbers were rounded, for instance H of few tokens.
    """
    for name, g, w in zip(names, got, want, strict=True):
        assert g.shape == w.shape, name
        if not w.is_floating_point():
            assert torch.equal(g.long(), w.long()), name
        else:
            wide = name in ROUTING or name in ("S", "dweights", "dw", "drouter_bias")
            kind = torch.float32 if wide else dtype
            few = g.numel() <= 256 or tokens < 16
            units = 16 if wide else UNITS[kind] * (1.5 if few else 1)
            if name == "drouter_bias":  # E numbers, each a sum in which terms cancel
                units = 32
            assert_accurate(name, g, w, dtype=kind, units=units)


def in_fp64(values):
    return [v.double() if v is not None and v.is_floating_point() else v for v in values]


@every_dtype
@every_case
def test_routed_lora(kernels, case, dtype):
    """Forward, then backward with the gradients of all outputs of the routing."""
    inputs = sample(case, dtype)
    got = routed(kernels, inputs, case, "rank_dense")
    want = routed(reference, in_double(inputs), case)
    compare(["y", *ROUTING, "S"], got, want, dtype)
    check_routed_backward(kernels, inputs, case, want, dtype)


def check_routed_backward(kernels, inputs, case, out, dtype, chosen="rank_dense"):
    dy, aux = noise(case.T, case.D_out, dtype=dtype), cotangents(case)
    saved = [out[i] for i in (1, 2, 3, 7)]
    given = [saved[0], *(v.float() for v in saved[1:])]
    got = routed_backward(kernels, inputs, case, dy, aux, given, *all_needed(chosen=chosen))
    want = routed_backward(
        reference, in_double(inputs), case, dy.double(), in_fp64(aux), in_fp64(given)
    )
    compare(["dx", "dw", "da", "db", "drouter_bias"], got, want, dtype, case.T)


@pytest.mark.parametrize("drop", ["top_p", "threshold"])
@some("tiles fit", "one past a tile", "wide: dense")
def test_dropped_experts(kernels, case, drop):
    inputs = sample(case)
    got = routed(kernels, inputs, case, "rank_dense", drop=drop)
    want = routed(reference, in_double(inputs), case, drop=drop)
    assert (want[1] == -1).any()
    compare(["y", *ROUTING, "S"], got, want, torch.float32)
    check_routed_backward(kernels, inputs, case, want, torch.float32)


@every_dtype
@some("one token", "wide", "unequal ranks", "shared A", "wide: 1024 ranks")
def test_decode(kernels, case, dtype):
    """Few tokens: D_in and D_out are split into ranges of 256 columns."""
    case = replace(case, D_in=600, D_out=530)
    inputs = sample(case, dtype)
    got = routed(kernels, inputs, case, "decode")
    want = routed(reference, in_double(inputs), case)
    compare(["y", *ROUTING, "S"], got, want, dtype)
    check_routed_backward(kernels, inputs, case, want, dtype, "decode")


@every_dtype
@every_case
def test_grouped_lora(kernels, case, dtype):
    inputs = grouped_sample(case, dtype)
    exact = {k: v.double() if k != "ids" and v is not None else v for k, v in inputs.items()}
    got = grouped(kernels, inputs, case, "rank_dense")
    want = grouped(reference, exact, case)
    compare(["y", "S"], got, want, dtype)
    s = want[1].float()
    got = grouped_backward(kernels, inputs, case, s, *all_needed())
    want = grouped_backward(reference, exact, case, s.double())
    compare(["dx", "dweights", "da", "db"], got, want, dtype, case.T)


@every_dtype
@pytest.mark.parametrize(
    "case", [c for c in CASES + WIDE if c.K * c.E < 200], ids=lambda case: case.name
)
def test_segmented(kernels, case, dtype):
    """The caller's ids, then the router's; S is by slots and the reference is rank-dense."""
    inputs = grouped_sample(case, dtype)
    exact = {k: v.double() if k != "ids" and v is not None else v for k, v in inputs.items()}
    y, s = grouped(kernels, inputs, case, "segmented")
    assert s.shape == (case.T, plan.saved_ranks("segmented", case.offsets, case.K, case.shared_a))
    want, dense_s = grouped(reference, exact, case)
    compare(["y"], [y], [want], dtype)
    got = grouped_backward(kernels, inputs, case, s, *all_needed(chosen="segmented"))
    want = grouped_backward(reference, exact, case, dense_s)
    compare(["dx", "dweights", "da", "db"], got, want, dtype, case.T)

    *got, s = routed(kernels, inputs, case, "segmented")
    *want, dense_s = routed(reference, in_double(inputs), case)
    compare(["y", *ROUTING], got, want, dtype)
    dy, aux = inputs["dy"], cotangents(case)
    got = routed_backward(
        kernels, inputs, case, dy, aux, [*got[1:4], s], *all_needed(chosen="segmented")
    )
    want = routed_backward(
        reference, in_double(inputs), case, dy.double(), in_fp64(aux), [*want[1:4], dense_s]
    )
    compare(["dx", "dw", "da", "db", "drouter_bias"], got, want, dtype, case.T)


@slots.every_call
def test_slots(kernels, case, dtype, form):
    """Rows apart or summed, forward and backward."""
    slots.check(kernels, case, form, dtype)


@slots.every_form
@pytest.mark.parametrize(
    "check", [slots.check_layouts, slots.check_needs, slots.check_empty], ids=lambda f: f.__name__
)
def test_contract_of_slots(kernels, check, form):
    check(kernels, form)


@every_case
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_router_topk(kernels, case, adapters):
    """The router alone, with weights in fp32 or x's dtype; backward with each output left out."""
    v = sample(case, torch.bfloat16)
    v["router_weight"] = v["router_weight"].to(adapters)

    def forward(ops, v):
        return ops.router_topk(
            v["x"], v["router_weight"], v["bias"], v["router_bias"], *router(case)
        )

    want = forward(reference, in_double(v))
    compare(ROUTING, forward(kernels, v), want, torch.float32)
    ids, weights, logits = want[0], want[1].float(), want[2].float()
    for missing in range(5):  # 4: none is missing
        aux = [None if i == missing else a for i, a in enumerate(cotangents(case))]
        given = [*aux, ids, weights, logits]
        got = kernels.router_topk_backward(*given, case.gate, case.renormalize)
        want = reference.router_topk_backward(*in_fp64(given), case.gate, case.renormalize)
        compare(["logits"], [got], [want], torch.float32)


@every_dtype
@some("odd", "one past a tile", "no rows", "wide: 1024 ranks", "one expert")
def test_matmuls(kernels, case, dtype):
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
        ("expand", (h2, b2, None, None, base), ["y"]),  # fp32 products with any dtype of x
        ("wgrad", (h, x), ["S"]),  # an fp32 H is not rounded
    ]
    for name, args, names in calls:
        more = (dtype,) if name == "expand" else ()
        got = getattr(kernels, name)(*args, *more)
        more = (torch.float64,) if name == "expand" else ()
        want = getattr(reference, name)(*in_fp64(args), *more)
        got, want = ((v,) if isinstance(v, torch.Tensor) else v for v in (got, want))
        compare(names, got, want, dtype)


@every_dtype
@some("long", "wide", "unequal ranks")
def test_no_worse_than_eager(kernels, case, dtype):
    """The error of y is at most that of plain PyTorch in the same dtype."""
    inputs = sample(case, dtype)
    got = routed(kernels, inputs, case, "rank_dense")
    want = eager.routed_lora(in_double(inputs), case, got[1])[0]
    assert_accurate("y", got[0], want, eager.routed_lora(inputs, case, got[1])[0])


@pytest.mark.parametrize("chosen", plan.PLANS)
def test_public_functions(kernels, chosen, monkeypatch):
    """Through autograd, as a user calls them."""
    case = BY_NAME["unequal ranks"]
    v = sample(case)
    want = results(in_double(v), case, torch.float64)
    monkeypatch.setattr(plan, "choose", lambda *shapes, **more: chosen)
    with through(kernels):
        got = results(v, case, torch.float32)
    compare(NAMES, got, want, torch.float32)


@some("odd", "tiles fit", "many experts", "no rows", "wide: 1024 ranks")
def test_route_logits(kernels, case):
    """Decisions equal those of router_topk bit for bit; the given logits are not changed."""
    v = sample(case)
    *want, counts = kernels.router_topk(
        v["x"], v["router_weight"], v["bias"], v["router_bias"], *router(case)
    )
    logits = want.pop(2)
    before = logits.clone()
    got = kernels.route_logits(logits, v["bias"], *router(case))
    for a, b in zip(got, [*want, counts], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_a_models_own_experts(kernels, family):
    """LoraMoeExperts sorts its slots by expert and equals its formula."""
    pytest.importorskip("transformers")
    from ..support.models import moes

    layer, *given = moes.layer(family)
    given[0].requires_grad_()
    leaves = [given[0], *layer.adapter_state().values()]
    want = moes.literal(layer, *given)
    grads = torch.autograd.grad(want.sin().sum(), leaves)
    with through(kernels):
        y = layer(*given)
        found = torch.autograd.grad(y.sin().sum(), leaves)
    for a, b in zip([y, *found], [want, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
