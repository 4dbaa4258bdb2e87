"""LoraMoeMLP equals its formula, one whole FFN per expert, in fp64; its effect on the base."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, Routing, use_routing
from lora_moe.mlp import LoraMoeMLP

from ..support.ffns import DTYPE, FFNS, GPU, B, D, E, F, L, R, expert, input_of, layer_of

NEAR = {"rtol": 1e-4, "atol": 2e-5} if GPU else {"rtol": 1e-12, "atol": 1e-12}


class Residual(nn.Module):
    """Bloom's form: takes one more argument, the residual, and adds it."""

    def __init__(self):
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x, residual):
        return residual + self.dense_4h_to_h(torch.tanh(self.dense_h_to_4h(x)))


every_ffn = pytest.mark.parametrize("ffn", FFNS)
ROUTERS = {
    "top-2": {},
    "top-1, its gate": {"top_k": 1},
    "dense sigmoid": {"top_k": E, "gate": "sigmoid", "renormalize": False},
    "top-p": {"top_k": E, "top_p": 0.6, "renormalize": False},
    "threshold": {"top_k": 2, "threshold": 0.55, "renormalize": False, "router_bias": True},
}


def formula(layer, p, x, routing):
    """sum over slots of w FFN_e(x), token by token; the plain FFN for a token without experts."""
    rows, base = x.reshape(-1, D), expert(layer, {}, 0)
    logits = rows @ p["router_weight"].T + p.get("router_bias", 0)
    gates = torch.softmax(logits, 1) if layer.config.gate == "softmax" else torch.sigmoid(logits)
    out = []
    for t, ids in enumerate(routing.indices.tolist()):
        ids = [e for e in ids if e >= 0]
        total = sum(gates[t, e] for e in ids) if layer.config.normalizes else 1
        terms = [gates[t, e] / total * expert(layer, p, e)(rows[t : t + 1]) for e in ids]
        out.append(sum(terms) if terms else base(rows[t : t + 1]))
    return torch.cat(out).view(x.shape)


@pytest.mark.parametrize("router", ROUTERS)
@every_ffn
def test_equals_its_formula(ffn, router):
    layer, x = layer_of(ffn, **ROUTERS[router]), input_of()
    y = layer(x)
    p = {k: t.detach().clone().requires_grad_() for k, t in layer.adapter_state().items()}
    wide = x.detach().clone().requires_grad_()
    want = formula(layer, p, wide, layer.routing)
    torch.testing.assert_close(y, want, **NEAR)
    assert (want - layer.base_layer(x)).abs().max() > 0.1
    if router in ("top-p", "threshold"):
        assert (layer.routing.indices < 0).any()
    if router == "threshold":
        assert (layer.routing.indices < 0).all(1).any()
    dy = torch.randn_like(want)
    y.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(x.grad, wide.grad, **NEAR)
    for key, tensor in layer.adapter_state().items():
        torch.testing.assert_close(
            tensor.grad, p[key].grad, **NEAR, msg=lambda m, k=key: f"{k}: {m}"
        )
        assert p[key].grad.abs().max() > 1e-6, key


@pytest.mark.parametrize(
    "fields", [{"shared_a": True}, {"r": (1, 4, 2, 3), "alpha": (1.0, 2.0, 3.0, 4.0)}], ids=str
)
def test_one_a_for_all_and_unequal_ranks(fields):
    layer, x = layer_of("gated", **fields), input_of()
    want = formula(layer, layer.adapter_state(), x, (layer(x), layer.routing)[1])
    torch.testing.assert_close(layer(x), want, **NEAR)


@every_ffn
def test_a_token_without_experts_is_the_ffn_bit_for_bit(ffn):
    layer, x = layer_of(ffn, dtype=torch.float32), input_of(torch.float32)
    ids = torch.tensor([[0, 1], [-1, -1], [2, -1], [-1, -1], [-1, 3]]).repeat(2, 1)
    with use_routing(layer, routing=Routing.from_ids(ids, num_experts=E)), torch.no_grad():
        y = layer(x).view(-1, D)
    base = expert(layer, {}, 0)(x).view(-1, D)
    none = (ids < 0).all(1)
    assert torch.equal(y[none], base[none])
    assert ((y - base).abs().amax(1)[~none] > 1e-3).all()


def test_b_of_zeros_is_the_ffn():
    layer, x = layer_of("gated, biases", dtype=torch.float32), input_of(torch.float32)
    for _, lora_B in layer.pairs():
        nn.init.zeros_(lora_B)
    torch.testing.assert_close(layer(x), expert(layer, {}, 0)(x), rtol=1e-6, atol=1e-6)


def test_an_ffn_that_takes_more_and_adds_it():
    torch.manual_seed(0)
    names = ("dense_h_to_4h", "dense_4h_to_h")
    config = LoraMoeConfig(num_experts=E, r=R, placement="ffn", target_modules=names)
    layer = LoraMoeMLP(Residual().to(DTYPE), config)
    for tensor in layer.adapter_state().values():
        nn.init.normal_(tensor, std=0.7)
    x, residual = input_of(), input_of(seed=5)
    bare = LoraMoeMLP(copy.deepcopy(layer.base_layer), config)
    bare.load_state_dict(layer.state_dict())
    y = layer(x, residual=residual)
    torch.testing.assert_close(y - residual, bare(x, 0 * residual), **NEAR)


def test_the_callers_routing_and_frozen_experts():
    layer, x = layer_of("gated"), input_of()
    layer.frozen = (1,)
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [1, 3]]).repeat(2, 1)
    weights = torch.rand(B * L, 2, dtype=DTYPE, requires_grad=True)
    with use_routing(layer, routing=Routing.from_ids(ids, weights, num_experts=E)):
        y = layer(x)
    rows = x.view(-1, D)
    want = torch.cat(
        [
            sum(w * expert(layer, layer.adapter_state(), e)(rows[t : t + 1]) for e, w in zip(i, v))
            for t, (i, v) in enumerate(zip(ids.tolist(), weights))
        ]
    )
    torch.testing.assert_close(y.view(-1, D), want, **NEAR)
    y.square().sum().backward()
    assert weights.grad.abs().min() > 0 and not layer.router_weight.grad.any()
    for A, B_ in layer.pairs():
        for t in (A, B_):
            assert t.grad.any() and not t.grad[layer.offsets[1] : layer.offsets[2]].any()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    layer = layer_of("gated", dtype=torch.float32)
    wide, x = copy.deepcopy(layer).to(DTYPE), input_of(torch.float32)
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
    else:
        layer.base_layer.to(torch.bfloat16)
        y = layer(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    r = layer.routing
    routing = Routing.from_ids(r.indices, r.weights.to(DTYPE), num_experts=E)
    with use_routing(wide, routing=routing):
        want = wide(x.to(DTYPE))
    assert (y - want).norm() < 0.02 * want.norm()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in layer.adapter_state().values())


def test_dropout_affects_the_input_of_experts_only():
    layer, x = layer_of("gated", dropout=0.5), input_of()
    layer.train()
    for _, lora_B in layer.pairs():
        nn.init.zeros_(lora_B)
    torch.testing.assert_close(layer(x), expert(layer, {}, 0)(x), **NEAR)
    nn.init.normal_(layer.lora_B_up_proj)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
