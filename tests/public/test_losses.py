"""Router losses against literal sums over tokens and experts."""

from __future__ import annotations

import math

import pytest
import torch

from lora_moe import (
    Routing,
    losses,
)
from lora_moe import functional as F

T, E, K, D = 12, 4, 2, 6


def inputs(seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, D, generator=g), torch.randn(E, D, generator=g) * scale


def route(x, w, gate="softmax", top_k=K):
    return F.router_topk(x, w, top_k, gate=gate)


def gates_of(x, w, gate):
    logits = x @ w.T
    return torch.softmax(logits, 1) if gate == "softmax" else torch.sigmoid(logits)


def balance_by_loop(x, w, routing, gate):
    p, total = gates_of(x, w, gate), 0.0
    ids = routing.indices.flatten().tolist()
    for e in range(E):
        share = sum(i == e for i in ids) / len(ids)
        total = total + share * sum(p[t, e] for t in range(len(x))) / len(x)
    return E * total


def cv_by_loop(values):
    values = list(values)
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def importance_by_loop(x, w, routing, gate):
    p = gates_of(x, w, gate)
    return cv_by_loop(sum(p[t, e] for t in range(len(x))) for e in range(E))


def z_by_loop(x, w, routing, gate):
    total = 0.0
    for row in x @ w.T:
        total = total + torch.log(sum(torch.exp(logit) for logit in row)) ** 2
    return total / len(x)


def entropy_by_loop(x, w, routing, gate):
    p = gates_of(x, w, "softmax")
    return sum(-p[t, e] * torch.log(p[t, e]) for t in range(len(x)) for e in range(E)) / len(x)


LOSSES = [
    (losses.load_balance_loss, balance_by_loop),
    (losses.cv_squared, importance_by_loop),
    (losses.z_loss, z_by_loop),
    (losses.router_entropy, entropy_by_loop),
]


def assert_same_value_and_gradients(loss, literal, gate="softmax"):
    """`loss(routing)` in fp32 against literal(x, w, routing, gate) in fp64."""
    x, w = (t.requires_grad_() for t in inputs())
    out = loss(route(x, w, gate))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    want = literal(*wide, route(x, w, gate), gate)
    assert out.shape == () and out.item() == pytest.approx(float(want.detach()), rel=1e-5)
    grads = torch.autograd.grad(out, (x, w)), torch.autograd.grad(want, wide)
    for grad, truth in zip(*grads, strict=True):
        assert truth.abs().max() > 1e-4
        torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("loss, literal", LOSSES, ids=[f.__name__ for f, _ in LOSSES])
def test_losses_equal_the_literal_sums(loss, literal, gate):
    assert_same_value_and_gradients(loss, literal, gate)


def test_label_loss():
    labels = torch.tensor([e % E for e in range(T)])
    labels[3] = -100

    def literal(x, w, routing, gate):
        p = gates_of(x, w, "softmax")
        kept = [t for t in range(T) if t != 3]
        return sum(-torch.log(p[t, labels[t]]) for t in kept) / len(kept)

    assert_same_value_and_gradients(lambda r: losses.label_loss(r, labels), literal)


def test_localized_cv_squared():
    expert_types, sample_types, delta = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1]), 0.3

    def literal(x, w, routing, gate):
        p, z = gates_of(x, w, "softmax"), []
        for b in range(3):
            for e in range(E):
                total = sum(p[t, e] for t in range(4 * b, 4 * b + 4))
                z.append(total * (1.3 if expert_types[e] == sample_types[b] else 0.7))
        return cv_by_loop(z)

    assert_same_value_and_gradients(
        lambda r: losses.localized_cv_squared(r, expert_types, sample_types, delta), literal
    )
    with pytest.raises(ValueError, match="sequence of 12 tokens, got 5"):
        losses.localized_cv_squared(route(*inputs()), expert_types, torch.zeros(5))


def test_values_at_the_extremes():
    balanced = route(torch.eye(E).repeat(2, 1), torch.eye(E), top_k=1)
    assert losses.load_balance_loss(balanced).item() == pytest.approx(1.0)
    assert losses.cv_squared(balanced).item() == pytest.approx(0.0, abs=1e-6)
    collapsed = route(torch.ones(T, E), 50 * torch.eye(E)[:1] * torch.eye(E), top_k=1)
    assert losses.load_balance_loss(collapsed).item() == pytest.approx(E, rel=1e-3)
    assert losses.cv_squared(collapsed).item() == pytest.approx(E - 1, rel=1e-3)
    assert losses.router_entropy(collapsed).item() == pytest.approx(0.0, abs=1e-3)
    undecided = route(torch.ones(T, E), torch.zeros(E, E))
    assert losses.router_entropy(undecided).item() == pytest.approx(math.log(E))
    assert losses.z_loss(undecided).item() == pytest.approx(math.log(E) ** 2)


def test_no_tokens_is_no_loss():
    empty = route(torch.zeros(0, D), inputs()[1])
    for loss, _ in LOSSES:
        assert loss(empty).item() == 0.0


def test_a_routing_by_the_caller_has_no_balance_loss():
    routing = Routing.from_ids(torch.zeros(T, dtype=torch.long), num_experts=E)
    for loss, _ in LOSSES:
        with pytest.raises(ValueError, match="from a router"):
            loss(routing)
