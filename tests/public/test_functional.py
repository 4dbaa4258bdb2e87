"""The public functions as black boxes: the same tests run on every backend (LORA_MOE_BACKEND).

The reference is the stacked formulation of eager.py in fp64 on the same rounded inputs, with gradients from
autograd; the tolerance comes from the same formulation in the tested dtype.
"""

from __future__ import annotations

import pytest
import torch

from lora_moe import Routing
from lora_moe import functional as F

from ..support import eager
from ..support.cases import BY_NAME, every_case, in_double, leaves, sample, some_cases
from ..support.compare import UNIT, assert_accurate, relative_error
from ..support.functions import (
    BACKEND,
    PARAMETERS,
    assert_picks_are_top_k,
    assert_same_bits,
    cotangents,
    every_dtype,
    experts_of,
    gradients,
    pinned,
    routed,
    routing_outputs,
)


def forward_bound(case, dtype):
    """Rounding y once costs 0.42 u. The C++ kernels round nothing else, except H in bf16: 0.60 u."""
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
        else:  # the router computes in fp32 for any dtype of x
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert_accurate(name, out, want, units=16, dtype=wide)
    want = torch.bincount(routing.indices.flatten().long(), minlength=case.E)
    assert torch.equal(routing.counts, want)


@every_dtype
@every_case
def test_routed_lora_gradients(case, dtype):
    """All gradients, with every output of the routing in the loss (balance, z-loss, distillation)."""
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
        if name == "router_bias" and dtype == torch.float32:  # E numbers are too few
            assert_accurate("drouter_bias", got[name], want[name], units=16)
        else:
            assert_accurate(f"d{name}", got[name], want[name], usual[name], dtype=dtype)


@every_dtype
@some_cases("odd", "tiles fit", "unequal ranks", "shared A", "many experts", "no rows")
def test_grouped_lora(case, dtype):
    """A routing by the caller: empty slots, repeated ids, negative weights; values and gradients."""
    names = ("x", "lora_A", "lora_B", "base", "weights")
    inputs = sample(case, dtype)
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, case.E, (case.T, case.K), generator=g, dtype=torch.int32)
    ids[: case.T // 2, -1] = ids[: case.T // 2, 0]  # repeated ids add up
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
    """The normal case with PEFT: products in x's dtype; gradients in the adapter's, summed in fp32."""
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
        # dy and H are rounded to dtype as operands; the sum over tokens is not
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
    for name in got:  # the other rows may be summed in other tiles
        assert torch.equal(got[name] == 0, want[name] == 0), name
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)


def test_optimizer_step_between_calls_leaves_no_stale_cache():
    case = BY_NAME["odd"]
    v = sample(case)
    first, _ = routed(v, case)
    with torch.no_grad():
        v["lora_B"].mul_(2)
    second, _ = routed(v, case)
    torch.testing.assert_close(second - v["base"], 2 * (first - v["base"]), rtol=1e-4, atol=1e-5)


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


def test_rank_masks_are_gates_of_single_rank_experts():
    """MoRE: a task uses a prefix of the ranks, each with its own scale: a gate per rank row, E = R."""
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
