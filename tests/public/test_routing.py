"""Routings as black boxes, on every backend: from logits, from gates, repeated, with dropped experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_moe import Routing
from lora_moe import functional as F

from ..support import eager
from ..support.cases import BY_NAME, in_double, leaves, sample, some_cases
from ..support.compare import assert_accurate
from ..support.functions import (
    PARAMETERS,
    assert_same_bits,
    cotangents,
    every_dtype,
    experts_of,
    gradients,
    pinned,
    routed,
)


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


@pytest.mark.parametrize(
    "options", [{}, {"threshold": 0.2}, {"top_p": 0.5, "gate": "softmax"}], ids=str
)
@some_cases("odd", "one past a tile", "unequal ranks", "many experts", "no rows", "one token")
def test_routing_from_logits_equals_that_of_the_router(case, options):
    """Bit for bit, and so are the gradients of the logits."""
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
    # a router with identity weights: x = logits, W = I
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


def _detached(t):
    return None if t is None else t.detach()


@pytest.mark.parametrize(
    "options", [{"top_p": 0.6}, {"threshold": 0.3}, {"threshold": 1.0}], ids=str
)
@pytest.mark.parametrize("renormalize", [True, False])
@some_cases("tiles fit", "one past a tile", "unequal ranks")
def test_dropped_experts(case, renormalize, options):
    """A loop over a token's gates decides which picks are dropped; values and gradients follow."""
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
