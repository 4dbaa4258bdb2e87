"""Routers and middles of the presets: empty slots, dropped experts, scales."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, inject, losses, presets, use_routing
from lora_moe.routers import NoisyRouter

D, T = 6, 40


def layer_of(config, std=0.7, dtype=torch.float64):
    torch.manual_seed(0)
    layer = inject(nn.Sequential(nn.Linear(D, D, dtype=dtype)), config)[0]
    for tensor in layer.adapter_state().values():
        nn.init.normal_(tensor.data, std=std)
    return layer, torch.randn(1, T, D, dtype=dtype)


def test_adamole_takes_from_no_expert_to_all():
    layer, x = layer_of(presets.adamole(4, 2, max_threshold=1.0, target_modules=("0",)), std=0.3)
    layer.threshold_bias.data.fill_(-1.2)
    y = layer(x)
    taken = (layer.routing.indices >= 0).sum(1)
    assert torch.equal(taken, (layer.routing.weights > 0).sum(1))
    assert layer.routing.counts.sum() == taken.sum()
    assert {0, 1, 2, 4} <= set(taken.tolist())
    assert torch.equal(y[0, taken == 0], layer.base_layer(x)[0, taken == 0])


def test_mlore_without_a_task_is_the_generic_expert_alone():
    layer, x = layer_of(
        presets.mlore(2, (1, 2), 1, 8, generic_r=2, task_r=1, target_modules=("0",))
    )
    with use_routing(layer, task_ids=torch.tensor([-1])):
        y = layer(x)
    A, B = layer.lora_A[:2], layer.lora_B[:2]
    torch.testing.assert_close(y, layer.base_layer(x) + 8 / 2 * (x @ A.T @ B))


def test_expert_dropout_leaves_one_and_does_not_affect_losses():
    router = NoisyRouter(expert_dropout=0.9)
    config = LoraMoeConfig(num_experts=4, r=2, top_k=2, router=router, target_modules=("0",))
    layer, x = layer_of(config)
    layer(x)
    weights, ids = layer.routing.weights, layer.routing.indices
    torch.testing.assert_close(weights.sum(1), torch.ones(T, dtype=weights.dtype))
    assert (weights.amax(1) == 1).float().mean() > 0.5  # usually one expert is left
    clean = x[0] @ layer.router_weight.T
    assert (ids[:, 0] != clean.argmax(1)).float().mean() > 0.4
    torch.testing.assert_close(layer.routing.logits, clean)
    p = torch.softmax(clean, 1)
    entropy = losses.router_loss(layer, losses.router_entropy)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1).mean())
    layer.eval()(x)
    assert torch.equal(layer.routing.indices[:, 0].long(), clean.argmax(1))


def test_noise_has_the_requested_standard_deviation():
    """Of two equal logits, noise picks either one with a margin of std * sqrt(2) * n."""
    router = NoisyRouter(std=0.5)
    config = LoraMoeConfig(num_experts=2, r=1, top_k=2, router=router, target_modules=("0",))
    layer, _ = layer_of(config)
    layer.router_weight.data.zero_()
    layer(torch.randn(1, 4000, D, dtype=torch.float64))
    margin = (layer.routing.weights[:, 0] / layer.routing.weights[:, 1]).log()  # |difference|
    assert margin.square().mean().sqrt().item() == pytest.approx(0.5 * 2**0.5, rel=0.05)


def test_unpaired_factors_take_the_scale_of_b():
    scales = (1.0, 2.0, 3.0, 4.0)
    layer, x = layer_of(presets.conditional_mixlora(4, 2, 1.0, target_modules=("0",), scored=False))
    y = layer(x) - layer.base_layer(x)
    i, j = layer.routing.indices[0].long().chunk(2)
    assert (i != j).any()
    scaled, _ = layer_of(
        LoraMoeConfig(**layer.config.to_dict() | {"alpha": scales})  # the same random state
    )
    got = scaled(x) - scaled.base_layer(x)
    want = sum(scales[b] * (x @ layer.lora_A[a])[..., None] * layer.lora_B[b] for a, b in zip(i, j))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        y, 0.5 * sum((x @ layer.lora_A[a])[..., None] * layer.lora_B[b] for a, b in zip(i, j))
    )
    assert not layer.routing.weights.requires_grad  # in the public code neither


@pytest.mark.parametrize("segments", [3, 7])
def test_segments_divide_the_length(segments):
    layer, x = layer_of(presets.smola(2, 1, segments=segments, target_modules=("0",)))
    with pytest.raises(ValueError, match=f"divisor of the length 40, got {segments}"):
        layer(x)
    with pytest.raises(ValueError, match=r"\(B, L, D_in\)"):
        layer(x[0])
