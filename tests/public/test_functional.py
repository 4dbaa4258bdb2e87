"""The public functions as black boxes: the same tests run on every backend (LORA_MOE_BACKEND).

The reference is the stacked formulation of eager.py in fp64 on the same rounded inputs, with gradients from
autograd; the tolerance comes from the same formulation in the tested dtype.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lora_moe import Routing, backend_info, plan
from lora_moe import functional as F

from ..support import eager
from ..support.cases import BY_NAME, CASES, every_case, in_double, leaves, sample, some_cases
from ..support.compare import UNIT, assert_accurate, relative_error

BACKEND = backend_info()["serving"]["cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
if BACKEND != "triton":
    DTYPES.append(torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PARAMETERS = ("x", "router_weight", "lora_A", "lora_B", "base", "router_bias")


def experts_of(case):
    return {"rank_offsets": case.offsets, "shared_a": case.shared_a}


def routed(inputs, case, **more):
    args = (inputs[k] for k in ("x", "router_weight", "lora_A", "lora_B"))
    rest = {k: inputs[k] for k in ("scaling", "base", "bias", "router_bias")}
    return F.routed_lora(*args, case.K, **rest, **experts_of(case), **case.options, **more)


def routing_outputs(y, routing):
    return {
        "y": y,
        "weights": routing.weights,
        "logits": routing.logits,
        "mean_prob": routing.mean_prob,
        "lse": routing.lse,
    }


def cotangents(outputs, seed=7):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=g, dtype=torch.float64) for o in outputs]


def gradients(outputs, dys, inputs, names):
    used = {k: inputs[k] for k in names if inputs[k] is not None}
    grads = torch.autograd.grad(
        outputs, list(used.values()), [d.to(o.dtype) for d, o in zip(dys, outputs, strict=True)]
    )
    return dict(zip(used, grads, strict=True))


def forward_bound(case, dtype):
    """Rounding y once costs 0.42 u; the C++ kernels round nothing else, or in bf16 also H: 0.60 u."""
    wide = case.D_in >= 256 and case.R // case.E >= 8
    low = dtype in (torch.bfloat16, torch.float16)
    if BACKEND == "cpp" and low and wide:
        return {"units": 0.62} if dtype == torch.bfloat16 else {"factor": 0.9, "units": 0.5}
    return {"factor": 1.02 if low and case.K == 1 else None}


@every_dtype
@every_case
def test_routed_lora(case, dtype):
    inputs = sample(case, dtype)
    y, routing = routed(inputs, case)
    outputs = routing_outputs(y, routing)
    assert_picks_are_top_k(routing.indices, inputs, case)
    truth = eager.routed_lora(in_double(inputs), case, routing.indices)
    plain = eager.routed_lora(inputs, case, routing.indices)
    for (name, out), want, usual in zip(outputs.items(), truth, plain, strict=True):
        if name == "y":
            assert_accurate(name, out, want, usual, **forward_bound(case, dtype))
        else:  # the router works in fp32 whatever x is
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert_accurate(name, out, want, units=16, dtype=wide)
    want = torch.bincount(routing.indices.flatten().long(), minlength=case.E)
    assert torch.equal(routing.counts, want)


def assert_picks_are_top_k(indices, inputs, case):
    """Ids are distinct, and no expert left out beats one picked by more than rounding."""
    p, _ = eager.gates(inputs["x"].double(), inputs["router_weight"], case, inputs["router_bias"])
    score = p if inputs["bias"] is None else p + inputs["bias"].double()
    picked = torch.zeros_like(score, dtype=torch.bool).scatter(1, indices.long(), True)
    assert (picked.sum(1) == case.K).all()
    worst_in = torch.where(picked, score, torch.inf).amin(1)
    best_out = torch.where(picked, -torch.inf, score).amax(1) if case.T else worst_in
    assert (best_out <= worst_in + 1e-6).all()
    ordered = score.gather(1, indices.long())
    assert (ordered.diff(dim=1) <= 1e-6).all(), "largest first"


@every_dtype
@every_case
def test_routed_lora_gradients(case, dtype):
    """Of everything, with every output of the routing in the loss (balance, z-loss, distillation)."""
    inputs = leaves(sample(case, dtype), *PARAMETERS)
    y, routing = routed(inputs, case)
    outputs = list(routing_outputs(y, routing).values())
    dys = cotangents(outputs)
    got = gradients(outputs, dys, inputs, PARAMETERS)
    want, usual = (
        gradients(eager.routed_lora(v, case, routing.indices), dys, v, PARAMETERS)
        for v in (leaves(in_double(inputs), *PARAMETERS), leaves(inputs, *PARAMETERS))
    )
    for name in got:
        assert got[name].dtype == inputs[name].dtype
        if name == "router_bias" and dtype == torch.float32:  # of E numbers chance decides
            assert_accurate("drouter_bias", got[name], want[name], units=16)
        else:
            assert_accurate(f"d{name}", got[name], want[name], usual[name], dtype=dtype)


@every_dtype
@some_cases("odd", "tiles fit", "unequal ranks", "shared A", "many experts", "no rows")
def test_grouped_lora(case, dtype):
    """The caller's routing: empty slots, repeated ids, negative weights; values and gradients."""
    names = ("x", "lora_A", "lora_B", "base", "weights")
    inputs = sample(case, dtype)
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, case.E, (case.T, case.K), generator=g, dtype=torch.int32)
    ids[: case.T // 2, -1] = ids[: case.T // 2, 0]  # repeated: adds up
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs["weights"] = torch.randn(case.T, case.K, generator=g).to(wide)

    def ours(v):
        return F.grouped_lora(
            v["x"], v["lora_A"], v["lora_B"], Routing.from_ids(ids, v["weights"], num_experts=case.E),
            scaling=v["scaling"], base=v["base"], **experts_of(case),
        )  # fmt: skip

    def theirs(v):
        return eager.grouped_lora(
            v["x"], v["lora_A"], v["lora_B"], ids, v["weights"], case, v["base"], v["scaling"]
        )

    runs = [leaves(v, *names) for v in (inputs, in_double(inputs), inputs)]
    y, truth, usual = ours(runs[0]), theirs(runs[1]), theirs(runs[2])
    assert_accurate("y", y, truth, usual, **forward_bound(case, dtype))
    dys = cotangents([y])
    got, want, plain = (
        gradients([out], dys, v, names) for out, v in zip((y, truth, usual), runs, strict=True)
    )
    for name in got:
        assert_accurate(f"d{name}", got[name], want[name], plain[name], dtype=dtype)


@pytest.mark.parametrize("outputs", ["y", "routing", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_router_bias_in_any_dtype_and_stride(dtype, outputs):
    """It is widened, exactly, and its gradient comes back in its own dtype, rounded once."""
    case = BY_NAME["one past a tile"]
    v = leaves(sample(case, torch.float32), *PARAMETERS)
    narrow = v["router_bias"].detach().to(dtype)
    wide = narrow.float().requires_grad_()
    spread = torch.stack([narrow, narrow + 1], 1)[:, 0].requires_grad_()
    assert spread.stride() == (2,)

    def run(router_bias):
        y, routing = routed({**v, "router_bias": router_bias}, case)
        loss = 0 if outputs == "routing" else y.square().sum()
        loss = loss if outputs == "y" else loss + routing.lse.square().sum()
        return routing.logits, torch.autograd.grad(loss, router_bias)[0]

    (logits, grad), (want, full) = run(spread), run(wide)
    assert_same_bits(logits, want)
    assert grad.dtype == dtype and full.abs().min() > 0
    assert torch.equal(grad, full.to(dtype))


def test_router_bias_is_a_weight_of_a_constant_feature():
    case = BY_NAME["long"]
    v = sample(case)
    router_bias = torch.linspace(-1, 1, case.E)
    y, routing = routed({**v, "router_bias": router_bias}, case)
    one, zero = torch.ones(case.T, 1), torch.zeros(case.R, 1)
    with_feature = {
        "x": torch.cat([v["x"], one], 1),
        "router_weight": torch.cat([v["router_weight"], router_bias[:, None]], 1),
        "lora_A": torch.cat([v["lora_A"], zero], 1),
    }
    want, as_weight = routed({**v, **with_feature}, case)
    assert torch.equal(routing.indices, as_weight.indices)
    assert not torch.equal(routing.indices, routed(v, case)[1].indices)
    torch.testing.assert_close(routing.logits, as_weight.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


def test_from_gates_is_the_dense_mixture():
    case = BY_NAME["dense"]
    inputs = leaves(sample(case), "x", "lora_A", "lora_B")
    gates = torch.randn(case.T, case.E, generator=torch.Generator().manual_seed(0))
    gates.requires_grad_()
    x, a, b = inputs["x"], inputs["lora_A"], inputs["lora_B"]
    y = F.grouped_lora(x, a, b, Routing.from_gates(gates), rank_offsets=case.ranks)
    want = torch.stack([
        sum(
            gates[t, e] * (b[4 * e : 4 * e + 4].T @ (a[4 * e : 4 * e + 4] @ x[t]))
            for e in range(case.E)
        )
        for t in range(case.T)
    ])  # fmt: skip
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for got, expected in zip(
        torch.autograd.grad(y, (x, a, b, gates), dy),
        torch.autograd.grad(want, (x, a, b, gates), dy),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_repeat_gives_each_sequence_its_decision():
    case = BY_NAME["tiles fit"]
    v = sample(case)
    decision = Routing.from_ids(torch.tensor([3, -1, 0, 7]), num_experts=case.E)
    tokens = decision.repeat(case.T // 4)
    assert tokens.indices.flatten().tolist() == [e for e in (3, -1, 0, 7) for _ in range(16)]
    assert tokens.counts.tolist() == [16, 0, 0, 16, 0, 0, 0, 16]
    y = F.grouped_lora(v["x"], v["lora_A"], v["lora_B"], tokens, rank_offsets=case.ranks)
    rows = slice(case.offsets[7], case.offsets[8])
    want = v["x"][48:] @ v["lora_A"][rows].T @ v["lora_B"][rows]
    torch.testing.assert_close(y[48:], want, rtol=1e-5, atol=1e-5)
    assert not y[16:32].any()


@every_dtype
@some_cases("odd", "one past a tile", "unequal ranks", "no rows")
def test_router_topk(case, dtype):
    names = ("x", "router_weight", "router_bias")
    inputs = leaves(sample(case, dtype), *names)
    x, w, router_bias = (inputs[k] for k in names)
    routing = F.router_topk(
        x, w, case.K, bias=inputs["bias"], router_bias=router_bias, **case.options
    )
    assert_picks_are_top_k(routing.indices, inputs, case)
    outputs = list(routing_outputs(None, routing).values())[1:]
    dys = cotangents(outputs)
    got = gradients(outputs, dys, inputs, names)
    doubled = leaves(in_double(inputs), *names)
    truth, plain = (
        eager.router_topk(v["x"], v["router_weight"], case, routing.indices, v["router_bias"])
        for v in (doubled, inputs)
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for out, want in zip(outputs, truth, strict=True):
        assert_accurate("routing", out, want, units=16, dtype=wide)
    want = gradients(truth, dys, doubled, names)
    usual = gradients(plain, dys, inputs, names)
    for name in got:
        assert_accurate(f"d{name}", got[name], want[name], usual[name], dtype=dtype)


@pytest.mark.parametrize(
    "options", [{}, {"threshold": 0.2}, {"top_p": 0.5, "gate": "softmax"}], ids=str
)
@some_cases("odd", "one past a tile", "unequal ranks", "many experts", "no rows", "one token")
def test_routing_from_logits_is_that_of_the_router(case, options):
    """To the bit, and so are the gradients of the logits."""
    v = sample(case)
    options = {"bias": v["bias"], **case.options, **options}
    want = F.router_topk(
        v["x"], v["router_weight"], case.K, router_bias=v["router_bias"], **options
    )

    def grads(logits, routing):
        out = routing.weights, routing.mean_prob, routing.lse, routing.logits
        return torch.autograd.grad(
            out, logits, [d.to(o.dtype) for d, o in zip(cotangents(out), out)]
        )

    given = want.logits.clone().requires_grad_()
    got = Routing.from_logits(given, case.K, **options)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    no_grad = Routing.from_logits(given.detach(), case.K, **options)
    assert all(map(torch.equal, no_grad, want))
    # through a router that hands on its input: x = logits, W = 1
    eye = torch.eye(case.E)
    x = want.logits.clone().requires_grad_()
    torch.testing.assert_close(
        grads(given, got), grads(x, F.router_topk(x, eye, case.K, **options)), rtol=1e-5, atol=1e-7
    )


@every_dtype
def test_routing_from_logits_of_any_dtype_stride_and_shape(dtype):
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 7, 10, generator=g, dtype=torch.float64).to(dtype)
    logits = wide[..., ::2].requires_grad_()  # (3, 7, 5), column stride 2
    routing = Routing.from_logits(logits, 2)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert routing.indices.shape == (21, 2) and routing.weights.dtype == acc
    assert torch.equal(routing.logits, logits.detach().reshape(21, 5).to(acc))
    p = torch.softmax(logits.detach().double().reshape(21, 5), 1)
    want, ids = p.topk(2, 1)
    assert torch.equal(routing.indices.long(), ids)
    assert_accurate("weights", routing.weights, want / want.sum(1, keepdim=True), units=16)
    (grad,) = torch.autograd.grad(routing.weights[:, 0].sum(), logits)
    assert grad.dtype == dtype and grad.shape == logits.shape and grad.abs().sum() > 0


@pytest.mark.skipif(BACKEND == "triton", reason="K rounds over E in registers: of few experts")
@pytest.mark.skipif(BACKEND == "reference", reason="PyTorch's own sums, which compensate nothing")
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("E, K", [(1024, 1024), (4096, 4096), (4096, 100), (1024, 32), (1024, 33)])
def test_many_experts_are_as_accurate_as_few(E, K, gate):
    """Weights, statistics and gradients within a few units, whose sums have thousands of terms."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(35, E, generator=g).requires_grad_()
    routing = Routing.from_logits(logits, K, gate=gate)
    exact = logits.detach().double().requires_grad_()
    p = torch.softmax(exact, 1) if gate == "softmax" else torch.sigmoid(exact)
    weights = p.gather(1, routing.indices.long())
    weights = weights / weights.sum(1, keepdim=True)
    assert_accurate("weights", routing.weights, weights, units=2)
    assert_accurate("lse", routing.lse, torch.logsumexp(exact, 1), units=2)
    assert_accurate("mean_prob", routing.mean_prob, p.mean(0), units=2)
    assert (routing.weights.sum(1, dtype=torch.float64) - 1).abs().max() <= 2 * UNIT[torch.float32]
    assert routing.counts.sum() == 35 * K
    dw = torch.randn(weights.shape, generator=g)
    (got,) = torch.autograd.grad(routing.weights, logits, dw)
    (want,) = torch.autograd.grad(weights, exact, dw.double())
    assert_accurate("dlogits", got, want, units=8)


@pytest.mark.skipif(BACKEND == "triton", reason="K rounds over E in registers: of few experts")
@pytest.mark.parametrize("K", [1, 32, 33, 63, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_order_of_many_picks(K, with_bias):
    """Of few picks and of many, found in other ways: ties to the lower id, NaN after everything else."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 3, (37, 64), generator=g).float()
    logits[5, 7], logits[6], logits[7, ::3] = torch.nan, torch.nan, -torch.inf
    bias = torch.randint(0, 3, (64,), generator=g) / 4 if with_bias else None
    routing = Routing.from_logits(logits, K, gate="sigmoid", bias=bias)
    p = Routing.from_logits(logits, 64, gate="sigmoid", renormalize=False)
    p = torch.empty(37, 64).scatter(1, p.indices.long(), p.weights)
    score = p if bias is None else p + bias
    score = torch.where(score.isnan(), -torch.inf, score)
    want = sorted_ids(score)[:, :K]
    assert routing.indices.tolist() == want.tolist()


def sorted_ids(score):
    rows = [sorted(range(len(row)), key=lambda e: (-row[e], e)) for row in score.tolist()]
    return torch.tensor(rows)


def test_a_mixture_of_given_logits_is_the_routed_one():
    case = BY_NAME["tiles fit"]
    v = sample(case)
    with pinned():
        want, routing = routed(v, case)
        again = Routing.from_logits(routing.logits, case.K, bias=v["bias"], **case.options)
        y = F.grouped_lora(
            v["x"], v["lora_A"], v["lora_B"], again, scaling=v["scaling"], base=v["base"],
            **experts_of(case),
        )  # fmt: skip
    assert_same_bits(y, want)


@every_dtype
@some_cases("odd", "wide", "many experts", "large rank", "no rows")
def test_shrink_and_expand(case, dtype):
    inputs = {**sample(case, dtype), "router_bias": None}

    def ours(v):
        s, logits = F.shrink(v["x"], v["lora_A"], v["router_weight"])
        return s, logits, F.expand(torch.tanh(s), v["lora_B"], v["base"])

    def theirs(v):
        s = v["x"] @ v["lora_A"].T
        logits = v["x"].to(v["router_weight"].dtype) @ v["router_weight"].T
        return s, logits, v["base"] + torch.tanh(s) @ v["lora_B"]

    runs = [leaves(v, *PARAMETERS) for v in (inputs, in_double(inputs), inputs)]
    outs = [f(v) for f, v in zip((ours, theirs, theirs), runs, strict=True)]
    for name, out, truth, usual in zip(("s", "logits", "y"), *outs, strict=True):
        assert_accurate(name, out, truth, usual, dtype=dtype)
    dys = cotangents(outs[0])
    grads = [gradients(out, dys, v, PARAMETERS) for out, v in zip(outs, runs, strict=True)]
    for name in grads[0]:
        assert_accurate(f"d{name}", *(g[name] for g in grads), dtype=dtype)


def test_shrink_without_router_and_expand_without_base():
    v = sample(BY_NAME["odd"])
    s, logits = F.shrink(v["x"], v["lora_A"])
    assert logits is None
    torch.testing.assert_close(s, v["x"] @ v["lora_A"].T)
    torch.testing.assert_close(F.expand(s, v["lora_B"]), s @ v["lora_B"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_adapters_on_a_low_precision_x(dtype):
    """PEFT's normal case: products in x's dtype, gradients in the adapter's, summed in fp32."""
    case = BY_NAME["long"]
    inputs = leaves(sample(case, dtype, adapter_dtype=torch.float32), *PARAMETERS)
    y, routing = routed(inputs, case)
    assert y.dtype == dtype
    dys = cotangents([y])
    got = gradients([y], dys, inputs, PARAMETERS)
    rounded = {
        k: v.to(dtype) if k.startswith("lora") else v for k, v in sample(case, dtype).items()
    }
    exact = leaves(in_double(rounded), *PARAMETERS)
    want = gradients(eager.routed_lora(exact, case, routing.indices)[:1], dys, exact, PARAMETERS)
    for name in ("lora_A", "lora_B", "router_weight"):
        assert got[name].dtype == torch.float32
        # dy and H are rounded to dtype on their way in, the sum over tokens is not
        assert relative_error(got[name], want[name]) < 1.0 * UNIT[dtype], name


def test_leading_dimensions_and_strides_are_free():
    case = BY_NAME["tiles fit"]
    v = sample(case)
    wide = torch.zeros(4, 16, 2 * case.D_in)
    wide[..., ::2] = v["x"].view(4, 16, -1)
    shifted = torch.zeros(case.T, case.D_out + 3)
    shifted[:, 3:] = v["base"]
    strided = dict(
        v,
        x=wide[..., ::2],
        router_weight=v["router_weight"].T.contiguous().T,
        lora_A=v["lora_A"].T.contiguous().T,
        lora_B=v["lora_B"].T.contiguous().T,
        base=shifted[:, 3:].view(4, 16, -1),
    )
    with pinned():
        want, _ = routed(v, case)
        y, routing = routed(strided, case)
        one, _ = routed({**v, "x": v["x"][5], "base": v["base"][5]}, case)
    assert y.shape == (4, 16, case.D_out) and routing.indices.shape == (case.T, case.K)
    assert_same_bits(y.view(case.T, -1), want)
    assert_same_bits(one, want[5])


def test_expanded_gradient_and_repeated_row():
    case = BY_NAME["odd"]
    inputs = leaves(sample(case), *PARAMETERS)
    y, _ = routed({**inputs, "x": inputs["x"][:1].expand(case.T, -1)}, case)
    got = torch.autograd.grad(y.sum(), [inputs[k] for k in PARAMETERS])
    y, _ = routed({**inputs, "x": inputs["x"][:1].repeat(case.T, 1)}, case)
    want = torch.autograd.grad(y, [inputs[k] for k in PARAMETERS], torch.ones(y.shape))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_every_subset_of_gradients():
    case = BY_NAME["unequal ranks"]
    full = leaves(sample(case), *PARAMETERS)
    y, _ = routed(full, case)
    dys = cotangents([y])
    want = gradients([y], dys, full, PARAMETERS)
    for mask in range(1, 2 ** len(PARAMETERS)):
        names = [n for i, n in enumerate(PARAMETERS) if mask >> i & 1]
        some = leaves(sample(case), *names)
        y, _ = routed(some, case)
        got = gradients([y], dys, some, names)
        assert all(torch.equal(got[n], want[n]) for n in names), names


@pytest.mark.parametrize("shared_a", [False, True])
def test_frozen_experts_get_exact_zeros(shared_a):
    case = BY_NAME["shared A" if shared_a else "tiles fit"]
    full = leaves(sample(case), *PARAMETERS)
    some = leaves(sample(case), *PARAMETERS)
    want = gradients(
        [routed(full, case)[0].square().sum()], cotangents([torch.ones(())]), full, PARAMETERS
    )
    got = gradients(
        [routed(some, case, frozen=(1, 6))[0].square().sum()], cotangents([torch.ones(())]), some, PARAMETERS
    )  # fmt: skip
    for e in (1, 6):
        rows = slice(case.offsets[e], case.offsets[e + 1])
        want["lora_B"][rows] = 0
        if not shared_a:
            want["lora_A"][rows] = 0
    for name in got:  # what is left may be summed in other tiles
        assert torch.equal(got[name] == 0, want[name] == 0), name
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


def test_top_1_renormalized_has_no_router_gradient():
    """w = p / p = 1: where the true gradient is zero the bound is absolute."""
    case = BY_NAME["tiles fit"]
    v = leaves(sample(case), "router_weight")
    y, _ = F.routed_lora(
        v["x"], v["router_weight"], v["lora_A"], v["lora_B"], 1, rank_offsets=case.ranks
    )
    (dw,) = torch.autograd.grad(y.square().sum(), v["router_weight"])
    assert dw.abs().max() < 1e-4


def pinned():
    """The same plan for every T, the one that is forced if any: bits are promised within a plan."""
    return plan.override(plan._forced or plan.BACKENDS[BACKEND][0])


def assert_same_bits(got, want):
    """The kernels' promise; the reference computes with BLAS, which promises it to the bit to nobody."""
    if BACKEND == "reference" and got.is_floating_point():
        assert_accurate("same", got, want.double(), units=12)
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_bf16_numbers_that_are_not_subnormal_are_kept(rows):
    """A CPU's bf16 dot takes what is below 2^-126 for zero; no product and no sum of others changes."""
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
    below = x / 4  # subnormal: as they are, or zero
    s, _ = F.shrink(below, a)
    assert (s.double() - below.double() @ a.double().T).abs().max() <= tiny * 32


# --- edges ---------------------------------------------------------------------------------------


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
        if dtype in (torch.bfloat16, torch.float16):  # few tokens round adapters as they read them
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
    """The smallest numbers included, which the CPU's own rounding to bf16 would lose."""
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


def test_optimizer_step_between_calls_leaves_no_stale_cache():
    case = BY_NAME["odd"]
    v = sample(case)
    first, _ = routed(v, case)
    with torch.no_grad():
        v["lora_B"].mul_(2)
    second, _ = routed(v, case)
    torch.testing.assert_close(second - v["base"], 2 * (first - v["base"]), rtol=1e-4, atol=1e-5)


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
            with pytest.raises(ValueError, match="scaling: expected a finite float or 3 of them"):
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
    """No slots, no rank rows, no columns: results are the base or zeros, never what memory held."""
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


@pytest.mark.parametrize("tokens", [5, 70])
def test_no_expert_to_pick_raises_without_a_graph_too(tokens):
    x, w, a, b = (torch.randn(s) for s in ((tokens, 24), (3, 24), (12, 24), (12, 16)))
    for top_k in (0, -1, 4):
        with torch.no_grad(), pytest.raises(ValueError, match="top_k: expected"):
            F.routed_lora(x, w, a, b, top_k, rank_offsets=4)
    with torch.no_grad(), pytest.raises(ValueError, match="base: expected"):
        F.routed_lora(x.view(5, -1, 24), w, a, b, 2, rank_offsets=4, base=torch.zeros(tokens, 16))


def test_logsumexp_of_infinite_logits():
    x = torch.tensor([[torch.inf, 1.0], [-torch.inf, 1.0], [torch.nan, 1.0], [1.0, -torch.inf]])
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    with torch.no_grad():
        routing = F.router_topk(x[:2, :1], w[::2, :1], 1)
    assert torch.equal(routing.lse, routing.logits.logsumexp(1))
    assert routing.lse.tolist() == [torch.inf, -torch.inf]
    with torch.no_grad():
        routing = F.router_topk(x, w, 1)
    torch.testing.assert_close(routing.lse, routing.logits.logsumexp(1), equal_nan=True)


def test_changed_saved_tensor_and_second_backward_raise():
    case = BY_NAME["odd"]
    v = leaves(sample(case), *PARAMETERS)
    y, _ = routed(v, case)
    with torch.no_grad():
        v["lora_A"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y, _ = routed(v, case)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


# --- a variable number of experts per token ---------------------------------------------------------


def _detached(t):
    return None if t is None else t.detach()


@pytest.mark.parametrize(
    "options", [{"top_p": 0.6}, {"threshold": 0.3}, {"threshold": 1.0}], ids=str
)
@pytest.mark.parametrize("renormalize", [True, False])
@some_cases("tiles fit", "one past a tile", "unequal ranks")
def test_dropped_experts(case, renormalize, options):
    """Every pick is kept or dropped as a loop over a token's gates says; values and gradients follow."""
    gate = "softmax" if "top_p" in options else case.gate
    case = replace(case, K=3, gate=gate, renormalize=renormalize)
    v = leaves(sample(case), *PARAMETERS)
    y, routing = routed(v, case, **options)
    p, _ = eager.gates(
        v["x"].detach().double(), v["router_weight"].detach(), case, _detached(v["router_bias"])
    )
    score = p if v["bias"] is None else p + v["bias"]
    for t, best in enumerate(
        score.sort(dim=1, descending=True, stable=True).indices[:, :3].tolist()
    ):
        kept, before = [], 0.0
        for e in best:
            dropped = p[t, e] < options.get("threshold", 0) or before >= options.get("top_p", 9)
            kept.append(-1 if dropped else e)
            before += p[t, e].item()
        assert routing.indices[t].tolist() == kept
    ids = routing.indices.long()
    assert torch.equal(routing.counts, torch.bincount(ids[ids >= 0], minlength=case.E))

    def plain(v):
        p, _ = eager.gates(v["x"], v["router_weight"], case, v["router_bias"])
        weights = torch.where(ids >= 0, p.gather(1, ids.clamp(min=0)), 0)
        if renormalize:
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-30)
        rest = ids, weights, case, v["base"], v["scaling"]
        return eager.grouped_lora(v["x"], v["lora_A"], v["lora_B"], *rest)

    exact = leaves(in_double(v), *PARAMETERS)
    want, dys = plain(exact), cotangents([y])
    assert_accurate("y", y, want, plain(v))
    got = gradients([y], dys, v, PARAMETERS)
    expected = gradients([want], dys, exact, PARAMETERS)
    for name in got:
        assert_accurate(f"d{name}", got[name], expected[name], units=16)


def test_rank_masks_are_gates_of_single_rank_experts():
    """MoRE: a task sees a prefix of the ranks, each with its own scale; a gate per rank row, E = R."""
    case = BY_NAME["tiles fit"]
    v = leaves(sample(case), "x", "lora_A", "lora_B")
    x, a, b = v["x"], v["lora_A"], v["lora_B"]
    g = torch.Generator().manual_seed(0)
    prefix = torch.randint(0, case.R + 1, (case.T, 1), generator=g)
    scale = torch.randn(case.R, generator=g)
    mask = torch.where(torch.arange(case.R) < prefix, scale, 0).requires_grad_()
    y = F.grouped_lora(x, a, b, Routing.from_gates(mask), rank_offsets=1)
    want = ((x @ a.T) * mask) @ b
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    dy = torch.randn(y.shape, generator=g)
    got, expected = (torch.autograd.grad(out, (x, a, b, mask), dy) for out in (y, want))
    for name, one, other in zip(("x", "lora_A", "lora_B", "mask"), got, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("T", [1, 5, 64, 65])
@pytest.mark.parametrize("shared_a", [False, True], ids=["private-a", "shared-a"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_adapters_act_as_if_they_were_rounded_first(dtype, shared_a, T):
    """Few tokens round the picked experts' rows only; the bits are those of rounding all of them."""
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
