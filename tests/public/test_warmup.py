"""warm_up runs every kind of layer and has no side effects."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_moe
from lora_moe import LoraMoeConfig, inject


def model(config=None):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24), nn.Linear(24, 16))
    return inject(layers, config or LoraMoeConfig(num_experts=4, r=2, target_modules=".*"))


def test_each_kind_of_layer_runs_once(monkeypatch):
    calls = []
    forward = lora_moe.LoraMoeLinear.add_experts
    monkeypatch.setattr(
        lora_moe.LoraMoeLinear,
        "add_experts",
        lambda self, x, *rest: calls.append((*x.shape, x.requires_grad)) or forward(self, x, *rest),
    )
    assert lora_moe.warm_up(model(), tokens=(1, 5)) == 2
    assert calls == [(1, 24, True), (5, 24, True), (1, 16, True), (5, 16, True)]
    calls.clear()
    lora_moe.warm_up(model(), tokens=(3,), backward=False)
    assert calls == [(3, 24, False), (3, 16, False)]


def test_it_has_no_side_effects():
    layers = model()
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    lora_moe.set_routing(layers, task_ids=torch.tensor([0, 1, -1]))
    want = layers(x)
    want.sum().backward()
    grads = {name: p.grad.clone() for name, p in layers.named_parameters() if p.grad is not None}
    routing = [layer.routing for layer in layers]
    lora_moe.warm_up(layers, tokens=(2,))
    assert all(a is b for a, b in zip(routing, [layer.routing for layer in layers], strict=True))
    for name, p in layers.named_parameters():
        assert (p.grad is None) == (name not in grads)
        assert p.grad is None or torch.equal(p.grad, grads[name])
    assert torch.equal(layers(x), want)


def test_ffns_run_slot_by_slot(monkeypatch):
    ffn = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    config = LoraMoeConfig(num_experts=4, r=2, placement="ffn", target_modules=("ffn.0", "ffn.2"))
    layers, calls = inject(nn.ModuleDict({"ffn": ffn}), config), []
    adapt = lora_moe.LoraMoeMLP.adapt
    monkeypatch.setattr(
        lora_moe.LoraMoeMLP,
        "adapt",
        lambda self, name, x, *rest: (
            calls.append((name, *x.shape, rest[-1])) or adapt(self, name, x, *rest)
        ),
    )
    assert lora_moe.warm_up(layers, tokens=(5,)) == 1
    assert calls == [("0", 5, 8, "apart"), ("2", 5, 2, 12, "sum")] and layers["ffn"].routing is None
    calls.clear()
    layers["ffn"](torch.randn(3, 8))
    assert calls == [("0", 3, 8, "apart"), ("2", 3, 2, 12, "sum")]


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="expected a model with experts"):
        lora_moe.warm_up(nn.Linear(2, 2))
