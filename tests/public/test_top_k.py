"""The router's top-k as a black box, on every backend: many experts, the bias, invalid top_k."""

from __future__ import annotations

import pytest
import torch

from lora_moe import Routing
from lora_moe import functional as F

from ..support import eager
from ..support.cases import BY_NAME, in_double, leaves, sample, some_cases
from ..support.compare import UNIT, assert_accurate
from ..support.functions import (
    BACKEND,
    PARAMETERS,
    assert_picks_are_top_k,
    assert_same_bits,
    cotangents,
    every_dtype,
    gradients,
    routed,
    routing_outputs,
)


@pytest.mark.parametrize("outputs", ["y", "routing", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_router_bias_in_any_dtype_and_stride(dtype, outputs):
    """The bias is widened exactly; its gradient is returned in its dtype, rounded once."""
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


@pytest.mark.skipif(BACKEND == "triton", reason="K rounds over E in registers: of few experts")
@pytest.mark.skipif(BACKEND == "reference", reason="PyTorch's own sums, which compensate nothing")
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("E, K", [(1024, 1024), (4096, 4096), (4096, 100), (1024, 32), (1024, 33)])
def test_many_experts_are_as_accurate_as_few(E, K, gate):
    """Weights, statistics and gradients stay within a few units although sums have thousands of terms."""
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
    """Few and many picks use different algorithms; ties go to the lower id, NaN comes last."""
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


def test_top_1_renormalized_has_no_router_gradient():
    """w = p / p = 1: the true gradient is zero, so the bound is absolute."""
    case = BY_NAME["tiles fit"]
    v = leaves(sample(case), "router_weight")
    y, _ = F.routed_lora(
        v["x"], v["router_weight"], v["lora_A"], v["lora_B"], 1, rank_offsets=case.ranks
    )
    (dw,) = torch.autograd.grad(y.square().sum(), v["router_weight"])
    assert dw.abs().max() < 1e-4


@pytest.mark.parametrize("tokens", [5, 70])
def test_an_invalid_top_k_raises_without_a_graph_too(tokens):
    x, w, a, b = (torch.randn(s) for s in ((tokens, 24), (3, 24), (12, 24), (12, 16)))
    for top_k in (0, -1, 4):
        with torch.no_grad(), pytest.raises(ValueError, match="top_k: expected"):
            F.routed_lora(x, w, a, b, top_k, rank_offsets=4)
    with torch.no_grad(), pytest.raises(ValueError, match="base: expected"):
        F.routed_lora(x.view(5, -1, 24), w, a, b, 2, rank_offsets=4, base=torch.zeros(tokens, 16))
