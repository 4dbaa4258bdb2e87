"""The CUDA kernels, operator by operator, against the reference in fp64 on the same rounded inputs.

Without a GPU they are compiled for the CPU, with one fiber per thread; every test runs the threads of a block
first to last and last to first.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch

from lora_moe import plan, reference

from ..support import eager, slots
from ..support.cases import BY_NAME, CASES, Case, in_double, sample
from ..support.compare import assert_accurate
from ..support.cuda_shim import build
from ..support.through import NAMES, results, through

pytestmark = pytest.mark.skipif(
    shutil.which(build.COMPILER) is None or sys.platform != "linux", reason="needs a C++ compiler"
)

WIDE = [  # more ranks or experts than a block's registers hold
    Case("wide: 160 ranks", 40, 10, 2, 16, 72, 33),
    Case("wide: 1024 ranks", 20, 64, 2, 16, 40, 33),
    Case("wide: unequal", 18, 8, 2, (64, 1, 3, 7, 1, 2, 1, 190), 40, 33, gate="sigmoid"),
    Case("wide: shared A", 17, 64, 3, 8, 33, 40, shared_a=True),
    Case("wide: dense", 5, 257, 257, 1, 17, 16, renormalize=False),
    Case("wide: 600 experts", 3, 600, 2, (2, *[1] * 599), 16, 17),
]
every_case = pytest.mark.parametrize("case", CASES + WIDE, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
# in units of the dtype: 16-bit results carry one rounding of H or dS and one of the output
UNITS = {torch.float32: 12, torch.bfloat16: 0.85, torch.float16: 0.85}
ROUTING = ["indices", "weights", "logits", "mean_prob", "lse", "counts"]
DROPS = {"all": (math.inf, 0.0), "top_p": (0.6, 0.0), "threshold": (math.inf, 0.25)}


def some(*names):
    cases = [BY_NAME[n] if n in BY_NAME else {c.name: c for c in WIDE}[n] for n in names]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@functools.cache
def built():
    return build.Kernels(build.build(sanitize="LORA_MOE_SHIM_SANITIZE" in os.environ))


@pytest.fixture(params=["forward", "reverse"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("CUDA_SHIM_ORDER", request.param)
    return built()


def compare(names, got, want, dtype, tokens=16):
    """Integers exactly, the router's numbers as fp32, the others as dtype demands.

    Where few numbers were rounded, those of H in few tokens among them, chance decides.
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
            if name == "drouter_bias":  # E numbers, in which terms of both signs cancel
                units = 32
            assert_accurate(name, g, w, dtype=kind, units=units)


def noise(*shape, seed=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype)


def in_fp64(values):
    return [v.double() if v is not None and v.is_floating_point() else v for v in values]


def router(case, drop="all"):
    return case.K, case.gate, case.renormalize, *DROPS[drop]


def routed(ops, v, case, *plan, drop="all"):
    return ops.routed_lora(
        v["x"], v["router_weight"], v["lora_A"], v["lora_B"], v["base"], v["bias"],
        v["router_bias"], v["scaling"],
        case.offsets, case.shared_a, *router(case, drop), *plan,
    )  # fmt: skip


def routed_backward(ops, v, case, dy, aux, saved, *needs):
    """With the gradient of router_bias, where `needs` are those of a kernel and do not name it."""
    ids, weights, logits, s = saved
    if len(needs) == 6:
        needs = (*needs[:5], True, needs[5])
    return ops.routed_lora_backward(
        dy, *aux, v["x"], v["router_weight"], v["lora_A"], v["lora_B"], s, ids, weights, logits,
        v["scaling"], case.offsets, case.shared_a, case.gate, case.renormalize, *needs,
    )  # fmt: skip


def all_needed(frozen=(), chosen="rank_dense"):
    return list(frozen), True, True, True, True, chosen


def cotangents(case):
    """Of weights, logits, mean_prob, lse."""
    T, E = case.T, case.E
    shapes = (T, case.K), (T, E), (E,), (T,)
    return [noise(*shape, seed=seed) for seed, shape in enumerate(shapes)]


# --- operators ----------------------------------------------------------------------------------


@every_dtype
@every_case
def test_routed_lora(kernels, case, dtype):
    """Forward, then backward with gradients of every output of the routing."""
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
    """Few tokens: D_in and D_out in stretches of 256 columns."""
    case = replace(case, D_in=600, D_out=530)
    inputs = sample(case, dtype)
    got = routed(kernels, inputs, case, "decode")
    want = routed(reference, in_double(inputs), case)
    compare(["y", *ROUTING, "S"], got, want, dtype)
    check_routed_backward(kernels, inputs, case, want, dtype, "decode")


def nasty_routing(case):
    """Empty slots, ids out of range, repeated ids, negative and zero weights."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, case.E, (case.T, case.K), generator=g, dtype=torch.int32)
    ids[: case.T // 2, -1] = ids[: case.T // 2, 0]
    ids[case.T // 2 : case.T // 2 + 1] = torch.iinfo(torch.int32).min
    ids[:1] = case.E
    weights = noise(case.T, case.K, seed=4)
    weights[-1:] = 0
    return ids, weights


def grouped(ops, v, case, *plan):
    return ops.grouped_lora(
        v["x"], v["lora_A"], v["lora_B"], v["base"], v["ids"], v["weights"], v["scaling"],
        case.offsets, case.shared_a, *slots.none(ops), *plan,
    )  # fmt: skip


def grouped_backward(ops, v, case, s, *rest):
    return ops.grouped_lora_backward(
        v["dy"], v["x"], v["lora_A"], v["lora_B"], s, v["ids"], v["weights"], v["scaling"],
        case.offsets, case.shared_a, *slots.none(ops), *rest,
    )  # fmt: skip


def grouped_sample(case, dtype, **more):
    ids, weights = nasty_routing(case)
    dy = noise(case.T, case.D_out, dtype=dtype)
    return sample(case, dtype, **more) | {"ids": ids, "weights": weights, "dy": dy}


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
    """The caller's ids, then the router's: what the rank-dense reference says, from an S by slots."""
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
    """Kept apart or summed, forward and backward."""
    slots.check(kernels, case, form, dtype)


@slots.every_form
@pytest.mark.parametrize(
    "check", [slots.check_layouts, slots.check_needs, slots.check_empty], ids=lambda f: f.__name__
)
def test_contract_of_slots(kernels, check, form):
    check(kernels, form)


@pytest.mark.parametrize("adapters", [torch.float32, torch.float16, torch.float64], ids=str)
@some("tiles fit", "unequal ranks")
def test_parameters_in_their_own_dtype(kernels, case, adapters):
    """They are rounded to x's dtype for the products; their gradients come back in their own."""
    inputs = grouped_sample(case, torch.bfloat16, adapter_dtype=adapters)
    rounded = {k: inputs[k].bfloat16() for k in ("lora_A", "lora_B")}
    want = grouped(kernels, inputs | rounded, case, "rank_dense")
    got = grouped(kernels, inputs, case, "rank_dense")
    assert all(map(torch.equal, got, want))
    grads = grouped_backward(kernels, inputs, case, got[1], *all_needed())
    wide = rounded | {k: v.float() for k, v in rounded.items()}
    _, _, *sums = grouped_backward(kernels, inputs | wide, case, got[1], *all_needed())
    for grad, total in zip(grads[2:], sums):
        assert grad.dtype == adapters
        assert torch.equal(grad, total.to(adapters))


@every_case
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_router_topk(kernels, case, adapters):
    """The router alone, its weight in fp32 or in x's dtype; backward of every subset of outputs."""
    v = sample(case, torch.bfloat16)
    v["router_weight"] = v["router_weight"].to(adapters)

    def forward(ops, v):
        return ops.router_topk(
            v["x"], v["router_weight"], v["bias"], v["router_bias"], *router(case)
        )

    want = forward(reference, in_double(v))
    compare(ROUTING, forward(kernels, v), want, torch.float32)
    ids, weights, logits = want[0], want[1].float(), want[2].float()
    for missing in range(5):  # 4: none
        aux = [None if i == missing else a for i, a in enumerate(cotangents(case))]
        given = [*aux, ids, weights, logits]
        got = kernels.router_topk_backward(*given, case.gate, case.renormalize)
        want = reference.router_topk_backward(*in_fp64(given), case.gate, case.renormalize)
        compare(["logits"], [got], [want], torch.float32)


@every_dtype
@some("odd", "one past a tile", "no rows", "wide: 1024 ranks", "one expert")
def test_matmuls(kernels, case, dtype):
    """shrink, expand with one and two pairs, gram, on an fp32 H."""
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
        ("expand", (h2, b2, None, None, base), ["y"]),  # fp32 products beside any x
        ("gram", (h, x), ["S"]),  # an fp32 H keeps its bits
    ]
    for name, args, names in calls:
        more = (dtype,) if name == "expand" else ()
        got = getattr(kernels, name)(*args, *more)
        more = (torch.float64,) if name == "expand" else ()
        want = getattr(reference, name)(*in_fp64(args), *more)
        got, want = ((v,) if isinstance(v, torch.Tensor) else v for v in (got, want))
        compare(names, got, want, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_fp32_operand_keeps_its_bits(kernels, dtype):
    """Beside an identity of 16 bits each sum is one number; a row's are up to 2^15 apart."""
    one = torch.eye(70, dtype=dtype)
    h = torch.ldexp(noise(70, 33).frexp().mantissa, torch.arange(70 * 33).view(70, 33) % 15)
    assert torch.equal(kernels.gram(h, one), h.T)
    _, logits = kernels.shrink(one, one, h.T.contiguous())
    assert torch.equal(logits, h)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [-90, -24, 16, 90])
def test_fp32_operands_of_any_size(kernels, power, dtype):
    """As a loss is scaled: 2^power times the operand is 2^power times the result, bit for bit."""
    x, h, w, b = noise(70, 40, dtype=dtype), noise(70, 33), noise(33, 40), noise(33, 72)
    some = torch.where(torch.arange(33) % 3 == 0, 1.0, 2.0**power)
    assert torch.equal(kernels.gram(h * some, x), kernels.gram(h, x) * some[:, None])
    scaled, plain = (kernels.shrink(x, x, v)[1] for v in (w * some[:, None], w))
    assert torch.equal(scaled, plain * some)
    scaled, plain = (
        kernels.expand(h * s, b / s, None, None, None, dtype) for s in (2.0**power, 1.0)
    )
    assert torch.equal(scaled, plain)

    case, v = BY_NAME["tiles fit"], sample(BY_NAME["tiles fit"], dtype)
    out = routed(kernels, v, case, "rank_dense")
    saved, no_dy = [out[i] for i in (1, 2, 3, 7)], torch.zeros(case.T, case.D_out, dtype=dtype)
    plain, scaled = (
        routed_backward(
            kernels, v, case, no_dy, [a * s for a in cotangents(case)], saved, *all_needed()
        )[1]
        for s in (1.0, 2.0**power)
    )
    assert torch.equal(scaled, plain * 2.0**power)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(kernels, value, dtype):
    """In its row of the result, and nowhere else."""
    x, h, b = noise(70, 40, dtype=dtype), noise(70, 33), noise(33, 72)
    wrong = h.clone()
    wrong[60, 5] = value
    got, want = kernels.gram(wrong, x), kernels.gram(h, x)
    assert not got[5].isfinite().any()
    assert torch.equal(got[torch.arange(33) != 5], want[torch.arange(33) != 5])
    got, want = (kernels.expand(v, b, None, None, None, dtype) for v in (wrong, h))
    assert not got[60].isfinite().any()
    assert torch.equal(got[torch.arange(70) != 60], want[torch.arange(70) != 60])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_infinite_weight_reaches_the_logits_as_in_fp32(kernels, value, dtype):
    """Not as inf - inf of the terms that it is split into."""
    x, w = noise(16, 64, dtype=dtype), noise(8, 64)
    w[5, 40] = value
    got = kernels.shrink(x, noise(8, 64, dtype=dtype), w)[1]
    torch.testing.assert_close(
        got, (x.double() @ w.double().T).float(), rtol=1e-5, atol=1e-5, equal_nan=True
    )


@every_dtype
@some("long", "wide", "unequal ranks")
def test_no_worse_than_eager(kernels, case, dtype):
    """y of plain PyTorch in the same dtype errs at least as much."""
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


# --- contract -----------------------------------------------------------------------------------


def test_rows_may_lie_anywhere(kernels):
    """x, base and dy sliced out of wider tensors or expanded: other loads, the same bits."""
    case = BY_NAME["tiles fit"]
    v = sample(case)
    dy = noise(case.D_out).expand(case.T, -1)
    plain = routed(kernels, v, case, "rank_dense")
    saved, aux = [plain[i] for i in (1, 2, 3, 7)], cotangents(case)
    grads = routed_backward(kernels, v, case, dy.contiguous(), aux, saved, *all_needed())

    def inside(t):
        frame = torch.full((t.shape[0] + 2, t.shape[1] + 5), torch.nan)
        frame[1:-1, 3:-2] = t
        return frame[1:-1, 3:-2]

    v |= {k: inside(v[k]) for k in ("x", "base", "lora_A", "lora_B", "router_weight")}
    aux[2] = aux[2].expand(3, -1)[1]
    again = routed(kernels, v, case, "rank_dense")
    got = routed_backward(kernels, v, case, dy, aux, saved, *all_needed())
    for a, b in zip([*plain, *grads], [*again, *got]):
        assert torch.equal(a, b)


@some("odd", "unequal ranks", "shared A", "wide: unequal")
def test_only_what_is_needed(kernels, case):
    v = sample(case)
    out = routed(kernels, v, case, "rank_dense")
    saved = [out[i] for i in (1, 2, 3, 7)]
    dy, none = noise(case.T, case.D_out), [None] * 4
    everything = routed_backward(kernels, v, case, dy, none, saved, *all_needed())
    for skipped in range(5):
        needs = [i != skipped for i in range(5)]
        got = routed_backward(kernels, v, case, dy, none, saved, [], *needs, "rank_dense")
        for i, (g, full) in enumerate(zip(got, everything)):
            assert g.shape == (0,) if i == skipped else torch.equal(g, full)
    frozen = [0, case.E - 1]
    _, _, da, db, _ = routed_backward(kernels, v, case, dy, none, saved, *all_needed(frozen))
    for e in range(case.E):
        rows = slice(*case.offsets[e : e + 2])
        assert torch.equal(db[rows], 0 * db[rows] if e in frozen else everything[3][rows])
        if not case.shared_a:
            assert torch.equal(da[rows], 0 * da[rows] if e in frozen else everything[2][rows])


@some("tiles fit", "unequal ranks", "shared A", "wide: 160 ranks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tokens_bits_do_not_depend_on_its_batch(kernels, case, dtype):
    case = replace(case, T=70)
    v = sample(case, dtype)
    full = routed(kernels, v, case, "rank_dense")
    for rows in slice(0, 1), slice(40, 57):
        part = {**v, "x": v["x"][rows], "base": v["base"][rows]}
        got = routed(kernels, part, case, "rank_dense")
        for i in (0, 1, 2, 3, 5, 7):  # all but the batch's statistics
            assert torch.equal(got[i], full[i][rows])


@pytest.mark.parametrize("case", [BY_NAME["one past a tile"], WIDE[1]], ids=lambda c: c.name)
def test_same_bits_in_any_order_of_threads(case, monkeypatch):
    v, dy = sample(case), noise(case.T, case.D_out)
    results = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("CUDA_SHIM_ORDER", order)
        out = routed(built(), v, case, "rank_dense")
        saved, aux = [out[i] for i in (1, 2, 3, 7)], cotangents(case)
        results.append([*out, *routed_backward(built(), v, case, dy, aux, saved, *all_needed())])
    assert all(map(torch.equal, *results))


@some("tiles fit", "many experts")
def test_ties_go_to_the_lower_id(kernels, case):
    v = sample(case, torch.bfloat16)
    v["router_weight"] = torch.zeros_like(v["router_weight"])
    ids = routed(kernels, {**v, "bias": None, "router_bias": None}, case, "rank_dense")[1]
    assert torch.equal(ids, torch.arange(case.K, dtype=torch.int32).expand(case.T, -1))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@some("tiles fit", "wide: unequal")
def test_a_wrong_row_stays_alone(kernels, case, value, gate):
    """Its ids are valid and distinct, and every other token keeps its bits."""
    case = replace(case, gate=gate)
    v = sample(case)
    clean = routed(kernels, v, case, "rank_dense")
    v["x"] = v["x"].clone()
    v["x"][3, 1] = value
    got = routed(kernels, v, case, "rank_dense")
    assert all(0 <= i < case.E for i in got[1][3].tolist())
    assert len(set(got[1][3].tolist())) == case.K
    others = [t for t in range(case.T) if t != 3]
    for i in (0, 1, 2, 3, 5, 7):
        assert torch.equal(got[i][others], clean[i][others])


@some("odd", "tiles fit", "many experts", "no rows", "wide: 1024 ranks")
def test_route_logits(kernels, case):
    """The decisions alone, to the bit those of router_topk, and the given logits stay as they are."""
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


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_special_logits_as_in_torch(kernels, gate):
    """inf, -inf and NaN, alone and together, ties among them: an identity router passes them on."""
    values = [0.0, 1.0, -2.0, torch.inf, -torch.inf, torch.nan]
    rows = torch.cartesian_prod(*[torch.tensor(values)] * 3)
    options = None, None, 2, gate, True, *DROPS["all"]
    got = [kernels.router_topk(torch.ones(1, 1), row[:, None], *options) for row in rows]
    ids, weights, _, mean_prob, lse, _ = (torch.cat(parts) for parts in zip(*got))
    p = reference.gate_values(rows, gate)
    assert torch.equal(ids.long(), reference.select_topk(p, 2))
    want = p.gather(1, ids.long())
    want = want / torch.where((z := want.sum(1, keepdim=True)) == 0, 1, z)
    assert torch.allclose(weights, want, equal_nan=True, rtol=1e-6, atol=0)
    assert torch.allclose(mean_prob.view_as(p), p, equal_nan=True, rtol=1e-6, atol=1e-38)
    assert torch.allclose(lse, torch.logsumexp(rows, 1), equal_nan=True, rtol=1e-6)


@some("tiles fit", "wide: unequal")
def test_nothing_leaks_from_experts_not_picked(kernels, case):
    """NaN in the A of an expert that nobody picked reaches neither y nor a gradient of another."""
    v = sample(case) | {"dy": noise(case.T, case.D_out), "base": None}
    v |= {"ids": torch.ones(case.T, 1, dtype=torch.int32), "weights": torch.ones(case.T, 1)}
    clean, _ = grouped(kernels, v, case, "rank_dense")
    a = v["lora_A"].clone()
    a[slice(*case.offsets[2:4])] = torch.nan
    y, s = grouped(kernels, v | {"lora_A": a}, case, "rank_dense")
    assert torch.equal(y, clean)
    grads = grouped_backward(kernels, v, case, s, *all_needed())
    assert all(g.isfinite().all() for g in grads)


@some("tiles fit", "shared A")
def test_a_wrong_lora_B_stays_out_of_gradients(kernels, case):
    """NaN in the B of an expert that nobody picked: a rank-dense y holds 0 NaN, dx and dA nothing."""
    v = sample(case) | {"dy": noise(case.T, case.D_out)}
    v |= {"ids": torch.ones(case.T, 1, dtype=torch.int32), "weights": torch.ones(case.T, 1)}
    _, s = grouped(kernels, v, case, "rank_dense")
    clean = grouped_backward(kernels, v, case, s, *all_needed())
    b = v["lora_B"].clone()
    b[: case.offsets[1]] = torch.nan
    got = grouped_backward(kernels, v | {"lora_B": b}, case, s, *all_needed())
    assert all(map(torch.equal, got, clean))


def test_nothing_added_leaves_base_bit_identical(kernels):
    case = BY_NAME["long"]
    v = sample(case, torch.bfloat16) | {"weights": torch.ones(case.T, 2)}
    ids = torch.full((case.T, 2), -1, dtype=torch.int32)
    for change in ({}, {"scaling": 0 * v["scaling"]}, {"lora_B": 0 * v["lora_B"]}):
        y, _ = grouped(
            kernels, v | {"ids": ids + 3 if change else ids} | change, case, "rank_dense"
        )
        assert torch.equal(y, v["base"])


def test_offsets_beyond_int32(kernels):
    """Rows 2^30 elements apart, in memory that is mapped but never touched in between."""
    rows, D, stride = 3, 32, 2**30 + 8
    memory = torch.frombuffer(mmap.mmap(-1, 2 * ((rows - 1) * stride + D)), dtype=torch.bfloat16)
    x = memory.as_strided((rows, D), (stride, 1)).copy_(noise(rows, D))
    a, w, h = noise(16, D).bfloat16(), noise(2, D), noise(rows, 16)
    calls = [
        lambda x: kernels.shrink(x, a, w),
        lambda x: [kernels.gram(h, x)],
        lambda x: [kernels.expand(h, a, None, None, x, torch.bfloat16)],
    ]
    for call in calls:
        assert all(map(torch.equal, call(x), call(x.contiguous())))


def test_what_is_refused(monkeypatch):
    case = BY_NAME["tiles fit"]
    kernels = built()
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        routed(kernels, sample(case, torch.float64), case, "rank_dense")
    with pytest.raises(ValueError, match=r"plan.*'other'"):
        routed(kernels, sample(case), case, "other")
    for wrong in (["together", "segmented"], ["apart", "decode"]):
        v = slots.inputs_of(case, "apart", torch.float32)
        names = ("x", "lora_A", "lora_B", "base", "ids", "weights", "scaling")
        with pytest.raises(ValueError, match=r"slots"):
            kernels.grouped_lora(*(v[k] for k in names), case.offsets, False, *wrong)
    with pytest.raises(ValueError, match=r"x: expected shape \(128, 128\), got \(64, 128\)"):
        slots.forward(kernels, v, case, "sum")
    wrong = sample(case)
    with pytest.raises(ValueError, match=r"lora_A: expected shape \(64, 128\), got \(64, 127\)"):
        routed(kernels, wrong | {"lora_A": wrong["lora_A"][:, 1:]}, case, "rank_dense")
    monkeypatch.setenv("CUDA_SHIM_CAPABILITY", "7")
    routed(kernels, sample(case, torch.float16), case, "rank_dense")
    with pytest.raises(ValueError, match=r"bfloat16: expected .* 8.0 or newer, got 7"):
        routed(kernels, sample(case, torch.bfloat16), case, "rank_dense")


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_a_models_own_experts(kernels, family):
    """LoraMoeExperts, whose slots are sorted by expert, equals its formula."""
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
