"""The Triton kernels, operator by operator, against the reference in fp64 on the same rounded inputs.

On a GPU they run compiled; otherwise they are interpreted, and also run under the sanitizer.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import mmap
import random
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from lora_moe import reference
from lora_moe.plan import PLANS

from ..support import eager, slots
from ..support.cases import BY_NAME, CASES, Case, in_double, sample
from ..support.compare import assert_accurate
from ..support.interpreter import Sanitizer, interpreting, overflow_checked

pytest.importorskip("triton")
INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
with interpreting() if INTERPRETED else contextlib.nullcontext():
    kernels = importlib.import_module("lora_moe.triton_kernels")
    router_file = importlib.import_module("lora_moe.triton_kernels.router_topk")

WIDE = [  # more ranks or experts than a program's registers hold
    Case("wide: 1024 ranks", 20, 64, 2, 16, 40, 33),
    Case("wide: unequal", 18, 8, 2, (64, 1, 3, 7, 1, 2, 1, 1), 40, 33, gate="sigmoid"),
    Case("wide: shared A", 17, 64, 3, 8, 33, 40, shared_a=True),
    Case("wide: dense", 5, 257, 257, 1, 17, 16, renormalize=False),
    Case("wide: one rank of 300", 17, 2, 2, (300, 5), 33, 16),
]
every_case = pytest.mark.parametrize("case", CASES + WIDE, ids=lambda case: case.name)
every_plan = pytest.mark.parametrize("plan", PLANS)
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
# in units of the dtype: 16-bit results carry one rounding of H or dS and one of the output
UNITS = {torch.float32: 12, torch.bfloat16: 0.85, torch.float16: 0.85}
ROUTING = ["indices", "weights", "logits", "mean_prob", "lse", "counts"]


def some(*names):
    cases = [BY_NAME[n] if n in BY_NAME else {c.name: c for c in WIDE}[n] for n in names]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def watched():
    return Sanitizer() if INTERPRETED else contextlib.nullcontext()


def on_device(inputs):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def host(outputs):
    return [v.cpu() for v in outputs]


def in_fp64(values):
    return [v.double() if v is not None and v.is_floating_point() else v for v in values]


def compare(names, got, want, dtype, tokens=16):
    """Integers exactly, the router's numbers as fp32, the others as dtype demands.

    Where few numbers were rounded, those of H in few tokens among them, chance decides.
    """
    for name, g, w in zip(names, host(got), want, strict=True):
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


def experts(case):
    return case.offsets, case.shared_a


def router(case):
    return case.K, case.gate, case.renormalize, math.inf, 0.0


# --- operators ----------------------------------------------------------------------------------


def routed(ops, v, case, *plan):
    return ops.routed_lora(
        v["x"], v["router_weight"], v["lora_A"], v["lora_B"], v["base"], v["bias"],
        v["router_bias"], v["scaling"],
        *experts(case), *router(case), *plan,
    )  # fmt: skip


def routed_backward(ops, v, case, dy, aux, saved, *needs):
    """With the gradient of router_bias, where `needs` are those of a kernel and do not name it."""
    ids, weights, logits, s = saved
    if len(needs) == 6:
        needs = (*needs[:5], True, needs[5])
    return ops.routed_lora_backward(
        dy, *aux, v["x"], v["router_weight"], v["lora_A"], v["lora_B"], s, ids, weights, logits,
        v["scaling"], *experts(case), case.gate, case.renormalize, *needs,
    )  # fmt: skip


def all_needed(frozen=(), plan="rank_dense"):
    return list(frozen), True, True, True, True, plan


def saved_as(plan, s, ids, case):
    """The reference's S as a plan keeps it."""
    by_slot = plan == "segmented" and not case.shared_a
    return reference.slots_of_rows(s, ids, case.offsets) if by_slot else s


@every_dtype
@every_case
def test_routed_lora(case, dtype):
    """Forward, then backward with gradients of every output of the routing."""
    check_routed_lora(case, dtype, "rank_dense")


@by_other_plans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_routed_lora_by_other_plans(case, dtype, plan):
    check_routed_lora(case, dtype, plan)


def check_routed_lora(case, dtype, plan):
    inputs = sample(case, dtype)
    with watched():
        got = routed(kernels, on_device(inputs), case, plan)
    want = list(routed(reference, in_double(inputs), case))
    s, ids = want[7], want[1]
    want[7] = saved_as(plan, s, ids, case)
    compare(["y", *ROUTING, "S"], got, want, dtype)

    dy, aux = noise(case.T, case.D_out, dtype=dtype), cotangents(case)
    given = [ids, want[2].float(), want[3].float(), want[7].float()]
    with watched():
        got = routed_backward(
            kernels, on_device(inputs), case, dy.to(DEVICE), [a.to(DEVICE) for a in aux],
            [v.to(DEVICE) for v in given], *all_needed(plan=plan),
        )  # fmt: skip
    given[3] = s.float()
    want = routed_backward(
        reference, in_double(inputs), case, dy.double(), in_fp64(aux), in_fp64(given)
    )
    compare(["dx", "dw", "da", "db", "drouter_bias"], got, want, dtype, case.T)


def cotangents(case):
    """Of weights, logits, mean_prob, lse."""
    T, E = case.T, case.E
    shapes = (T, case.K), (T, E), (E,), (T,)
    return [noise(*shape, seed=seed) for seed, shape in enumerate(shapes)]


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
    """Kept apart or summed, forward and backward."""
    with watched():
        slots.check(kernels, case, form, dtype, DEVICE)


@slots.every_form
@pytest.mark.parametrize(
    "check", [slots.check_layouts, slots.check_needs, slots.check_empty], ids=lambda f: f.__name__
)
def test_contract_of_slots(check, form):
    with watched():
        check(kernels, form, DEVICE)


@slots.every_form
def test_slots_in_any_order_of_programs(monkeypatch, form):
    case = replace(BY_NAME["one past a tile"], T=18)
    v = slots.on(slots.inputs_of(case, form, torch.float32), DEVICE)
    first = slots.results(kernels, v, case, form)
    if INTERPRETED:
        shuffle_programs(monkeypatch)
    assert all(map(torch.equal, slots.results(kernels, v, case, form), first))


@every_case
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16], ids=str)
def test_router_topk(case, adapters):
    """The router alone, its weight in fp32 or in x's dtype; backward of every subset of outputs."""
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
    for missing in range(5):  # 4: none
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
        ("gram", (h, x), ["S"]),  # an fp32 H keeps its bits
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
    """y of plain PyTorch in the same dtype errs at least as much."""
    inputs = sample(case, dtype)
    got = routed(kernels, on_device(inputs), case, "rank_dense")
    ids = got[1].cpu()
    want = eager.routed_lora(in_double(inputs), case, ids)[0]
    assert_accurate("y", got[0].cpu(), want, eager.routed_lora(inputs, case, ids)[0])


@some("odd", "tiles fit", "many experts", "no rows", "wide: 1024 ranks")
def test_route_logits(case):
    """The decisions alone, to the bit those of router_topk, and the given logits stay as they are."""
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


# --- contract -----------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [7, 40, 70])
def test_rows_may_lie_anywhere(T):
    """x, base and dy sliced out of wider tensors or expanded; parameters transposed."""
    case = replace(BY_NAME["tiles fit"], T=T)
    v = on_device(sample(case, torch.float32))
    dy = noise(case.D_out).to(DEVICE).expand(T, -1)
    saved = [routed(kernels, v, case, "rank_dense")[i] for i in (1, 2, 3, 7)]
    plain = routed(kernels, v, case, "rank_dense")
    aux = [a.to(DEVICE) for a in cotangents(case)]
    grads = routed_backward(kernels, v, case, dy.contiguous(), aux, saved, *all_needed())

    def inside(t):
        frame = torch.full((t.shape[0] + 2, t.shape[1] + 5), torch.nan, device=DEVICE)
        frame[1:-1, 3:-2] = t
        return frame[1:-1, 3:-2]

    v |= {k: inside(v[k]) for k in ("x", "base", "lora_A")}
    v["lora_B"] = v["lora_B"].T.contiguous().T
    aux[2] = aux[2][:1].expand(case.E)
    with watched():
        again = routed(kernels, v, case, "rank_dense")
        got = routed_backward(
            kernels, v, case, dy, aux[:2] + [None] + aux[3:], saved, *all_needed()
        )
    for a, b in zip(plain, again):
        assert torch.equal(a, b)
    assert torch.equal(got[3], grads[3])  # db does not depend on the router


@some("odd", "unequal ranks", "shared A", "wide: unequal")
def test_only_what_is_needed(case):
    v = on_device(sample(case))
    out = routed(kernels, v, case, "rank_dense")
    saved = [out[i] for i in (1, 2, 3, 7)]
    dy = noise(case.T, case.D_out).to(DEVICE)
    none = [None] * 4
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
        grads = [(db, everything[3])] + [(da, everything[2])] * (not case.shared_a)
        for got, full in grads:
            if e in frozen:
                assert not got[rows].any()
            else:  # in other tiles than before, as a frozen expert's rows cost nothing
                torch.testing.assert_close(got[rows], full[rows])


@every_plan
@some("tiles fit", "unequal ranks", "shared A", "wide: 1024 ranks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tokens_bits_do_not_depend_on_its_batch(case, dtype, plan):
    """Interpreted, not even on the size class of the batch."""
    case = replace(case, T=70)
    v = on_device(sample(case, dtype))
    full = routed(kernels, v, case, plan)
    for rows in (slice(0, 1), slice(40, 57)) if INTERPRETED else (slice(0, 65),):
        part = {**v, "x": v["x"][rows], "base": v["base"][rows]}
        got = routed(kernels, part, case, plan)
        for i in (0, 1, 2, 3, 5, 7):  # all but the batch's statistics
            assert torch.equal(got[i], full[i][rows])


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
    """All outputs and gradients in fp32, to 4 u; what the router decides exactly."""
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

    def shuffled(n):
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
def test_a_wrong_row_stays_alone(case, value, gate):
    """Its ids are valid and distinct, and every other token keeps its bits."""
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
    """inf, -inf and NaN, alone and together, ties among them."""
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
    """NaN in the A of an expert that nobody picked reaches neither y nor a gradient of another."""
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


def test_offsets_beyond_int32():
    """Rows 2^30 elements apart, in memory that is mapped but never touched in between."""
    if not INTERPRETED:
        pytest.skip("needs 13 GB of GPU memory")
    rows, D, stride = 3, 32, 2**30 + 8
    memory = torch.frombuffer(mmap.mmap(-1, 2 * ((rows - 1) * stride + D)), dtype=torch.bfloat16)
    x = memory.as_strided((rows, D), (stride, 1)).copy_(noise(rows, D))
    a, w = noise(16, D).bfloat16(), noise(2, D)
    with overflow_checked():
        got = kernels.shrink(x, a, w)
        gram = kernels.gram(noise(rows, 4), x)
        y = kernels.expand(noise(rows, 16), a, None, None, x, torch.bfloat16)
    for g, want in zip(got, kernels.shrink(x.contiguous(), a, w)):
        assert torch.equal(g, want)
    assert torch.equal(gram, kernels.gram(noise(rows, 4), x.contiguous()))
    want = kernels.expand(noise(rows, 16), a, None, None, x.contiguous(), torch.bfloat16)
    assert torch.equal(y, want)


def test_fp64_is_refused():
    case = BY_NAME["odd"]
    v = on_device(sample(case, torch.float64))
    with pytest.raises(TypeError, match="float64"):
        routed(kernels, v, case, "rank_dense")
    with pytest.raises(TypeError, match="float64"):
        kernels.gram(v["x"], v["x"])


def test_import_under_the_bare_name_is_refused():
    """That name is another project's, which others probe for."""
    code = "import sys; sys.path.insert(0, '.'); import triton_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: import lora_moe.triton_kernels" in done.stderr


def test_ranks_from_1_to_1024():
    """One expert of each rank, whatever the padding."""
    for rank in (1, 2, 3, 7, 12, 17, 24, 64, 127, 257, 1024):
        case = Case("", 5, 2, 1, (rank, 1), 17, 16)
        assert case.offsets == [0, *accumulate((rank, 1))]
        inputs = sample(case)
        with watched():
            got = routed(kernels, on_device(inputs), case, "rank_dense")
        want = routed(reference, in_double(inputs), case)
        compare(["y", *ROUTING, "S"], got, want, torch.float32)


# --- launching ----------------------------------------------------------------------------------


def test_a_tile_that_does_not_fit_is_tried_without_a_pipeline():
    from triton.runtime.errors import OutOfResources

    launching = importlib.import_module("lora_moe.triton_kernels.launching")
    tried = []

    class Kernel:
        def __init__(self, fits):
            self.fits = fits

        def __getitem__(self, grid):
            def run(*args, **options):
                tried.append(options["num_stages"])
                if options["num_stages"] > self.fits:
                    raise OutOfResources(200, 100, "shared memory")

            return run

    x = torch.zeros(1, device=DEVICE)
    launching.launch(x, Kernel(1), (1,), x, num_stages=3)
    assert tried == [3, 1]
    with pytest.raises(OutOfResources):
        launching.launch(x, Kernel(0), (1,), x, num_stages=3)


@pytest.mark.parametrize("plan", PLANS)
def test_what_does_not_fit_at_all_is_served_by_the_reference(plan):
    """Once with the S of every plan, and with one warning that names the operator."""
    from triton.runtime.errors import OutOfResources

    from lora_moe import backend

    def too_large(*args):
        raise OutOfResources(200, 100, "shared memory")

    case = BY_NAME["unequal ranks"]
    v = sample(case)
    run = backend._or_reference("routed_lora", too_large, OutOfResources)
    args = [
        v[k]
        for k in (
            "x",
            "router_weight",
            "lora_A",
            "lora_B",
            "base",
            "bias",
            "router_bias",
            "scaling",
        )
    ]
    with pytest.warns(RuntimeWarning, match="routed_lora does not fit this GPU"):
        got = run(*args, *experts(case), *router(case), plan)
    want = list(routed(reference, v, case))
    want[7] = saved_as(plan, want[7], want[1], case)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
