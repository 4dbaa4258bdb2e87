"""router_loss over a model with padding, in fp64, against literal sums over the real tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, inject, losses, use_routing

B, L, D, E = 3, 4, 6, 4
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(D, D, dtype=torch.float64) for _ in range(2))

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def run(seed=0, **fields):
    """A model after a forward over a padded batch, and the router input of each layer."""
    torch.manual_seed(seed)
    model = inject(Two(), LoraMoeConfig(num_experts=E, target_modules=("a", "b"), **fields)).train()
    for layer in (model.a, model.b):
        nn.init.normal_(layer.router_weight)
    x = torch.randn(B, L, D, dtype=torch.float64)
    x[MASK == 0] = 100.0  # padding, which must not affect the loss
    with use_routing(model, mask=MASK):
        model(x)
    with torch.no_grad():
        return model, [x, torch.tanh(model.a.base_layer(x))]  # B = 0, so the experts add zero


def probabilities(layer, x, gate=torch.softmax):
    """{(b, l): p (E,)} of the real tokens."""
    real = [(b, i) for b in range(B) for i in range(L) if MASK[b, i]]
    return {t: torch.softmax(x[t] @ layer.router_weight.T, -1) for t in real}


def cv(values):
    values = torch.stack(values)
    return ((values - values.mean()) ** 2).mean() / values.mean() ** 2


def localized(layer, x):
    types, kinds, p = [0, 0, 1, 1], [0, 1, 1], probabilities(layer, x)
    return cv(
        [
            sum(p[t][e] for t in p if t[0] == b) * (1.3 if types[e] == kinds[b] else 0.7)
            for b in range(B)
            for e in range(E)
        ]
    )


def of_labels(layer, x):
    p = probabilities(layer, x)
    return sum(-p[t][[2, 0, 3][t[0]]].log() for t in p) / len(p)


def of_token_labels(layer, x):
    p = probabilities(layer, x)
    kept = [t for t in p if t != (0, 1)]
    return sum(-p[t][(t[0] * L + t[1]) % E].log() for t in kept) / len(kept)


def entropy(layer, x):
    p = probabilities(layer, x)
    return sum(-(p[t] * p[t].log()).sum() for t in p) / len(p)


def importance(layer, x):
    p = probabilities(layer, x)
    return cv(list(sum(p.values())))


def straight_through(layer, x):
    """The shares of the slots, with the gradient of the mean gates."""
    p = torch.stack(list(probabilities(layer, x).values()))
    hard = torch.zeros_like(p).scatter(1, p.topk(2, 1).indices, 0.5)
    f = (hard + p - p.detach()).mean(0)
    return E * (f * p.mean(0)).sum()


def token_labels():
    labels = torch.arange(B * L) % E
    labels[1] = -100
    return labels


CASES = {
    "localized": (
        losses.localized_cv_squared,
        (torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1]), 0.3),
        localized,
    ),
    "label of a sequence": (losses.label_loss, (torch.tensor([2, 0, 3]),), of_labels),
    "label of a token": (losses.label_loss, (token_labels(),), of_token_labels),
    "entropy": (losses.router_entropy, (), entropy),
    "importance": (losses.cv_squared, (), importance),
    "straight-through balance": (losses.straight_through_balance, (), straight_through),
}


@pytest.mark.parametrize("case", CASES)
def test_mean_over_layers_without_padding(case):
    loss, args, literal = CASES[case]
    model, inputs = run()
    weights = [model.a.router_weight, model.b.router_weight]
    got = losses.router_loss(model, loss, *args)
    want = sum(literal(layer, x) for layer, x in zip((model.a, model.b), inputs, strict=True)) / 2
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    for one, other in zip(*(torch.autograd.grad(v, weights) for v in (got, want)), strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_a_loss_with_a_gate_argument_gets_that_of_the_layer():
    model, inputs = run(gate="sigmoid")
    want = 0
    for layer, x in zip((model.a, model.b), inputs, strict=True):
        p = torch.sigmoid(x[MASK != 0] @ layer.router_weight.T)
        want += cv(list(p.sum(0))) / 2
    torch.testing.assert_close(losses.router_loss(model, losses.cv_squared), want)


def test_what_it_refuses():
    model, _ = run()
    x = torch.zeros(B, L, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="sequence of 12 tokens, got 5"):
        losses.router_loss(model, losses.label_loss, torch.zeros(5))
    with torch.no_grad():
        model(x + 1)
    with pytest.raises(RuntimeError, match="with a graph"):
        losses.router_loss(model, losses.router_entropy)
    with torch.no_grad():
        assert 0 < losses.router_loss(model, losses.router_entropy).item() < 1.3863
    with use_routing(model, task_ids=torch.zeros(B, dtype=torch.long)):
        model(x)
    with pytest.raises(ValueError, match="that used its router"):
        losses.router_loss(model, losses.router_entropy)
