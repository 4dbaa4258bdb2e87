"""aux_loss and router_stats over a model; the selection bias."""

from __future__ import annotations

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

T, E, K, D = 12, 4, 2, 6


def inputs(seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, D, generator=g), torch.randn(E, D, generator=g) * scale


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
    assert model.a.lora_B.grad.any()  # layer a's experts change the input of layer b's router


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
    with torch.no_grad():  # no gradient is expected here
        assert aux_loss(model) > 0
    model.eval()
    with torch.no_grad():
        model(inputs()[0])
    assert aux_loss(model) > 0


def test_aux_loss_before_anything_ran():
    with pytest.raises(ValueError, match="got none"):
        aux_loss(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="no layer has run yet"):
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
    aux_loss(model).backward()  # model.b's graph is freed and must not be needed
    assert list(router_stats(model)) == ["a"]


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
    assert given["utilization"].tolist() == pytest.approx([8 / 3, 0, 4 / 3, 0])
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
    model.a.router_weight.data[1, 0] += 3  # most tokens pick expert 1
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


def test_update_selection_bias_requires_the_option():
    model = Model()
    model(inputs()[0])
    with pytest.raises(ValueError, match="selection_bias=True"):
        losses.update_selection_bias(model)
