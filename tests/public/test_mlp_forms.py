"""LoraMoeMLP as a module: copies, removal, and FFNs whose form it does not support."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, disable_adapters
from lora_moe.linear import ffn_width
from lora_moe.mlp import LoraMoeMLP

from ..support.ffns import B, D, E, F, Fused, Gated, L, Plain, R, expert, input_of, layer_of


def test_copies_and_pickles_have_their_own_hooks():
    layer, x = layer_of("gated"), input_of()
    y = layer(x)
    other = copy.deepcopy(layer)
    nn.init.zeros_(other.lora_B_up_proj)
    assert torch.equal(layer(x), y) and not torch.equal(other(x), y)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x), y) and again.routing is not None
    assert again.base_layer.up_proj._forward_hooks.popitem()[1].layer is again


def test_without_adapters_and_released_it_is_the_base():
    layer, x = layer_of("gated"), input_of()
    want = expert(layer, {}, 0)(x)
    with disable_adapters(layer):
        assert torch.equal(layer(x), want)
    assert torch.equal(layer.base_layer(x), want)  # called outside of the layer
    layer.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layer.base_layer.modules())


def test_its_linear_maps_are_attributes():
    layer = layer_of("gated")
    assert layer.down_proj is layer.base_layer.down_proj
    with pytest.raises(AttributeError, match="w1"):
        _ = layer.w1


class Mixing(Gated):
    def forward(self, x):
        return super().forward(x) + self.up_proj(x).mean() * 0


class Reshaping(Gated):
    def forward(self, x):
        return self.down_proj(self.up_proj(x).reshape(-1, F)) + 0 * self.gate_proj(x).sum()


class Idle(Gated):
    def forward(self, x):
        return self.down_proj(self.up_proj(x))


@pytest.mark.parametrize("kind", [Mixing, Reshaping, Idle])
def test_an_ffn_of_another_form_is_refused(kind):
    names = ("gate_proj", "up_proj", "down_proj")
    config = LoraMoeConfig(num_experts=E, r=R, placement="ffn", target_modules=names)
    layer = LoraMoeMLP(kind(), config)
    with pytest.raises(
        RuntimeError, match="expected an FFN whose forward calls each linear layer once"
    ):
        layer(torch.randn(B, L, D))
    from lora_moe.context import thread

    assert not thread.passes


def test_what_is_an_ffn():
    class Attention(nn.Module):
        def __init__(self, D=8, d=8):
            super().__init__()
            self.q, self.k, self.v, self.o = (
                nn.Linear(*s) for s in [(D, D), (D, d), (D, d), (D, D)]
            )

    assert ffn_width(Gated()) == ffn_width(Plain()) == ffn_width(Fused()) == D
    assert ffn_width(Attention()) is ffn_width(Attention(d=4)) is ffn_width(nn.Linear(2, 2)) is None
    same = type("SquareMLP", (nn.Module,), {})()
    same.up, same.down = nn.Linear(4, 4), nn.Linear(4, 4)
    assert ffn_width(same) == 4


@pytest.mark.parametrize(
    "base, fields, error, message",
    [
        (nn.Linear(2, 2), {}, TypeError, "base: expected an FFN"),
        (Gated(), {"target_modules": ("w1",)}, ValueError, "target_modules: expected names from"),
        (Gated(), {"target_modules": ()}, ValueError, "target_modules: expected names from"),
    ],
)
def test_what_does_not_fit_raises(base, fields, error, message):
    config = {"num_experts": E, "r": R, "placement": "ffn", "target_modules": ("up_proj",)} | fields
    with pytest.raises(error, match=message):
        LoraMoeMLP(base, LoraMoeConfig(**config))
