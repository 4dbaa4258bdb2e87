"""Poly equals PEFT's own layer; its sampling in training follows the relaxed Bernoulli distribution."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, LoraMoeLinear, plan, presets, use_routing

B, L, D_IN, D_OUT, E, R, N = 3, 20, 24, 18, 5, 4, 3
TASKS = torch.tensor([2, 0, 2])


def layer_of(base):
    layer = LoraMoeLinear(base, presets.poly(N, E, R))
    for parameter in layer.parameters(recurse=False):
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("mixed", [False, True], ids=["per token", "per sample"])
def test_equals_pefts_layer(train, mixed, monkeypatch):
    """In training, both start from the same generator state."""
    peft = pytest.importorskip("peft")
    from peft.tuners.poly.layer import Linear

    monkeypatch.setattr(plan, "mixes", lambda *shape: mixed)
    torch.manual_seed(0)
    base = nn.Linear(D_IN, D_OUT)
    ours = layer_of(copy.deepcopy(base)).train(train)
    config = peft.PolyConfig(r=R, n_tasks=N, n_skills=E)
    theirs = Linear(base, "default", config).train(train)
    A, B_e = theirs.poly_lora_A["default"], theirs.poly_lora_B["default"]
    table = theirs.poly_router["default"].module_logits
    with torch.no_grad():
        A.copy_(ours.lora_A.view(1, E, R, D_IN).mT)
        B_e.copy_(ours.lora_B.view(1, E, R, D_OUT))
        table.copy_(ours.router_table)
    x = torch.randn(B, L, D_IN, requires_grad=True)
    their_x = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    want = theirs(their_x, task_ids=TASKS)
    torch.manual_seed(1)
    with use_routing(ours, task_ids=TASKS):
        got = ours(x)
    dy = torch.randn_like(want)
    want.backward(dy)
    got.backward(dy)
    pairs = [(got, want), (x.grad, their_x.grad), (ours.router_table.grad, table.grad)]
    pairs += [(ours.lora_A.grad, A.grad.mT.reshape(-1, D_IN))]
    pairs += [(ours.lora_B.grad, B_e.grad.reshape(-1, D_OUT))]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_training_samples_relaxed_bernoulli_variables():
    torch.manual_seed(0)
    layer, x = layer_of(nn.Linear(D_IN, D_OUT)).train(), torch.randn(3, 2, D_IN)
    drawn = []
    for _ in range(2000):
        with torch.no_grad(), use_routing(layer, task_ids=torch.tensor([0, 0, 1])):
            layer(x)
        drawn.append(layer.routing.weights.gather(1, layer.routing.indices.long().argsort(1)))
    drawn = torch.stack(drawn).view(-1, 3, 2, E)
    assert torch.equal(drawn[:, :, 0], drawn[:, :, 1])  # one sample for all tokens of a sequence
    assert not torch.equal(drawn[:, 0], drawn[:, 1])
    torch.manual_seed(7)
    theirs = torch.distributions.RelaxedBernoulli(torch.tensor(1.0), logits=layer.router_table[:2])
    p = theirs.sample((4000,))
    want = (p / p.sum(2, keepdim=True)).mean(0)
    torch.testing.assert_close(drawn[:, 0, 0].mean(0), want[0], rtol=0, atol=0.03)
    torch.testing.assert_close(drawn[:, 2, 0].mean(0), want[1], rtol=0, atol=0.03)


def test_configurations_that_cannot_be_mixed():
    for fields in ({"shared_a": True}, {"r": (1, 2, 3, 4)}):
        config = LoraMoeConfig.from_dict(presets.poly(N, 4, R).to_dict() | fields)
        with pytest.raises(ValueError, match="one rank for all experts"):
            LoraMoeLinear(nn.Linear(4, 4), config)
