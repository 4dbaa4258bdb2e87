"""Router losses against literal sums over tokens and experts, and aux_loss over a model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_moe import (
    LoraMoeConfig,
    Routing,
    aux_loss,
    inject,
    injected,
    losses,
    router_stats,
    set_routing,
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


def test_a_routing_by_the_caller_has_no_router_to_balance():
    routing = Routing.from_ids(torch.zeros(T, dtype=torch.long), num_experts=E)
    for loss, _ in LOSSES:
        with pytest.raises(ValueError, match="from a router"):
            loss(routing)


# --- a model's loss ------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, **fields):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        config = LoraMoeConfig(num_experts=E, r=2, target_modules=("a", "b"), **fields)
        inject(self, config)
        for layer in injected(self).values():
            nn.init.normal_(layer.router_weight)
            nn.init.normal_(layer.lora_B)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_aux_loss_is_the_mean_over_layers():
    model = Model(balance_coef=0.5, z_coef=0.25)
    model(inputs()[0])
    want = 0.0
    for layer in (model.a, model.b):
        r = layer.routing
        want += 0.5 * losses.load_balance_loss(r).item() + 0.25 * losses.z_loss(r).item()
    loss = aux_loss(model)
    assert loss.shape == () and loss.item() == pytest.approx(want / 2)
    loss.backward()
    assert all(layer.router_weight.grad.any() for layer in (model.a, model.b))
    assert model.a.lora_B.grad.any()  # it shapes what the second router reads


@pytest.mark.parametrize("steps", [1, 3])
def test_aux_loss_accumulates_like_one_sum(steps):
    model, total = Model(), None
    for step in range(steps):
        model(inputs(step)[0])
        aux_loss(model).backward()
    summed, model.a.router_weight.grad = model.a.router_weight.grad.clone(), None
    for step in range(steps):
        model(inputs(step)[0])
        total = aux_loss(model) + (0 if total is None else total)
    total.backward()
    torch.testing.assert_close(model.a.router_weight.grad, summed)


def test_aux_loss_keeps_its_gradient_in_a_checkpoint():
    grads = []
    for run in (lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=False)):
        model, x = Model(), inputs()[0].requires_grad_()
        y = run(model, x)
        (y.square().mean() + aux_loss(model)).backward()
        grads.append([x.grad, model.a.router_weight.grad, model.b.router_weight.grad])
    for plain, saved in zip(*grads, strict=True):
        assert torch.equal(plain, saved)


def test_aux_loss_is_not_silently_lost():
    model = Model()
    checkpoint(model, inputs()[0].requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        aux_loss(model)
    with torch.no_grad():  # nobody expects a gradient here
        assert aux_loss(model) > 0
    model.eval()
    with torch.no_grad():
        model(inputs()[0])
    assert aux_loss(model) > 0


def test_aux_loss_before_anything_ran():
    with pytest.raises(ValueError, match="got none"):
        aux_loss(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="no layer has a routing"):
        aux_loss(Model())


def test_layers_with_a_routing_by_the_caller_do_not_count():
    model, x = Model(), inputs()[0]
    model(x)
    alone = (
        losses.load_balance_loss(model.a.routing) * 0.01 + losses.z_loss(model.a.routing) * 0.001
    )
    routing = Routing.from_ids(torch.zeros(T, dtype=torch.long), num_experts=E)
    set_routing(model, routing={"b": routing})
    model(x)
    assert aux_loss(model).item() == pytest.approx(alone.item())
    set_routing(model, routing=routing)
    model(x)
    assert aux_loss(model).item() == 0.0


def test_a_step_that_skips_a_layer_can_forget_it():
    model, x = Model(), inputs()[0]
    (model(x).sum() + aux_loss(model)).backward()
    set_routing(model)
    model.a(x)
    aux_loss(model).backward()  # model.b's graph is gone and is not asked for
    assert list(router_stats(model)) == ["a"]


# --- statistics ----------------------------------------------------------------------------------


def test_router_stats():
    model = Model()
    with pytest.raises(RuntimeError):
        router_stats(model)
    ids = torch.tensor([0] * 6 + [2] * 3 + [-1] * 3)
    set_routing(model, routing={"b": Routing.from_ids(ids, num_experts=E)})
    model(inputs()[0])
    stats = router_stats(model)
    given = stats["b"]
    assert given["load"].tolist() == pytest.approx([2 / 3, 0, 1 / 3, 0])
    assert given["utilisation"].tolist() == pytest.approx([8 / 3, 0, 4 / 3, 0])
    assert given["max_over_mean"] == pytest.approx(8 / 3)
    assert given["dead"] == [1, 3] and given["entropy"] is None
    free = stats["a"]
    counts = torch.bincount(model.a.routing.indices.flatten(), minlength=E)
    assert free["load"].tolist() == pytest.approx((counts / (T * 2)).tolist())
    assert free["entropy"] == pytest.approx(losses.router_entropy(model.a.routing).item())
    assert not any(v.requires_grad for v in free.values() if isinstance(v, torch.Tensor))


def test_selection_bias_moves_towards_balance():
    model = Model(selection_bias=True)
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1
    model.a.router_weight.data[1, 0] += 3  # nearly everybody wants expert 1
    model(x)
    mean = 200 * K / E
    want = [0.125 * (c < mean) - 0.125 * (c > mean) for c in model.a.routing.counts.tolist()]
    assert router_stats(model)["a"]["max_over_mean"] > 1.7
    losses.update_selection_bias(model, rate=0.125)
    assert model.a.selection_bias.tolist() == want and any(want)
    for step in range(80):
        model(x)
        losses.update_selection_bias(model, rate=0.1 * 0.93**step)
    model(x)
    assert router_stats(model)["a"]["max_over_mean"] < 1.25


def test_selection_bias_is_asked_for():
    model = Model()
    model(inputs()[0])
    with pytest.raises(ValueError, match="selection_bias=True"):
        losses.update_selection_bias(model)
