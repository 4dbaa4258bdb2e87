"""LoraMoeLinear against literal loops over tokens and experts."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, LoraMoeLinear, Routing

from ..support.compare import assert_accurate
from ..support.layers import (
    CONFIGS,
    D_IN,
    D_OUT,
    PARAMETERS,
    by_loop,
    every_config,
    experts_by_loop,
    gates_by_loop,
    in_double,
    make,
    tokens,
)


@every_config
def test_forward_and_gradients_equal_the_loops(config):
    layer, x = make(config), tokens(2, 6).requires_grad_()
    y = layer(x)
    want, leaves = by_loop(layer, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(dy)
    want.backward(dy.double().flatten(0, 1))
    assert_accurate("y", y.flatten(0, 1), want, units=8)
    grads = {"x": x.grad.flatten(0, 1)} | {n: layer.get_parameter(n).grad for n in PARAMETERS}
    for name, grad in grads.items():
        assert_accurate(f"d{name}", grad, leaves[name].grad, units=16)


@every_config
def test_starts_as_the_base_bit_for_bit(config):
    layer = LoraMoeLinear(nn.Linear(D_IN, D_OUT), config)
    x = tokens(7)
    assert torch.equal(layer(x), layer.base_layer(x))
    nn.init.ones_(layer.lora_B)
    assert not torch.equal(layer(x), layer.base_layer(x))


def test_initial_values_come_from_torchs_generator():
    config = LoraMoeConfig(num_experts=16, r=16)
    first, again, other = (
        (torch.manual_seed(seed), LoraMoeLinear(nn.Linear(64, 8), config))[1] for seed in (0, 0, 1)
    )
    for name in PARAMETERS:
        assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.lora_A, other.lora_A)
    bound = 64**-0.5
    assert 0.9 * bound < float(first.lora_A.detach().abs().max()) <= bound
    assert first.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert first.router_weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not first.lora_B.any()


def test_idle_experts_get_exact_zeros_not_none():
    layer = make()
    layer.routing_override = Routing.from_ids(torch.full((5,), 2), num_experts=4)
    layer(tokens(5)).sum().backward()
    busy = torch.zeros(12, dtype=torch.bool)
    busy[6:9] = True
    for grad in (layer.lora_A.grad, layer.lora_B.grad):
        assert torch.equal(grad.any(1), busy)
    assert not layer.router_weight.grad.any()  # not the router's choice; DDP needs a gradient


def test_frozen_experts_get_exact_zeros():
    layer, frozen, x = make(), make(), tokens(9)
    frozen.frozen = (1, 3)
    for module in (layer, frozen):
        module(x).sum().backward()
    kept = torch.tensor([True, False, True, False]).repeat_interleave(3)
    for name in ("lora_A", "lora_B"):
        full, part = layer.get_parameter(name).grad, frozen.get_parameter(name).grad
        assert full[~kept].any() and not part[~kept].any()
        assert torch.equal(full[kept], part[kept])


class Conv1D(nn.Module):
    """As in transformers: the weight is stored transposed."""

    def __init__(self):
        super().__init__()
        self.nf, self.nx = D_OUT, D_IN
        self.weight = nn.Parameter(torch.randn(D_IN, D_OUT) * 0.2)
        self.bias = nn.Parameter(torch.randn(D_OUT))

    def forward(self, x):
        return x @ self.weight + self.bias


class Quantized(nn.Module):
    """An integer weight and a scale: no parameter shows which dtype the adapter should have."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = D_IN, D_OUT
        weight = torch.randint(-8, 8, (D_OUT, D_IN), dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


class WeightOnly(nn.Module):
    """Only the weight's shape gives the sizes; the forward takes more than x."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D_OUT, D_IN))

    def forward(self, x, shift, *, factor=1.0):
        return x @ self.weight.T * factor + shift


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, Quantized, WeightOnly])
def test_linear_like_bases(kind):
    base = kind(D_IN, D_OUT) if kind is nn.Linear else kind()
    layer, x = make(base=base), tokens(3, 2)
    args, kwargs = ((2.0,), {"factor": 3.0}) if kind is WeightOnly else ((), {})
    assert (layer.in_features, layer.out_features) == (D_IN, D_OUT)
    assert layer.lora_A.dtype == torch.float32 and layer.lora_B.shape == (12, D_OUT)
    a, b, w, _ = in_double(layer)
    rows = x.double().flatten(0, 1)
    experts = experts_by_loop(layer.config, a, b, rows, gates_by_loop(layer.config, w, None, rows))
    want = base(x, *args, **kwargs).double().flatten(0, 1) + experts
    assert_accurate("y", layer(x, *args, **kwargs).flatten(0, 1), want, units=16)


def test_weight_and_bias_are_those_of_the_base():
    base = nn.Linear(D_IN, D_OUT, dtype=torch.bfloat16)
    layer = make(base=base)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert set(dict(layer.named_parameters())) == {
        *PARAMETERS,
        "base_layer.weight",
        "base_layer.bias",
    }


@pytest.mark.parametrize(
    "module", [nn.Embedding(8, 4), nn.LayerNorm(8), nn.Conv2d(2, 2, 1), nn.LazyLinear(4)], ids=repr
)
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match=type(module).__name__):
        LoraMoeLinear(module, CONFIGS["defaults"])


def test_a_layer_is_not_wrapped_twice():
    with pytest.raises(TypeError, match="LoraMoeLinear"):
        LoraMoeLinear(make(), CONFIGS["defaults"])


def test_a_base_that_returns_no_tensor_is_refused():
    base = nn.Linear(D_IN, D_OUT)
    base.register_forward_hook(lambda module, args, out: (out, None))
    with pytest.raises(TypeError, match="tuple"):
        make(base=base)(tokens(2))


def test_mode_follows_the_base():
    assert not LoraMoeLinear(nn.Linear(4, 4).eval(), CONFIGS["defaults"]).training
    assert LoraMoeLinear(nn.Linear(4, 4), CONFIGS["defaults"]).training


def test_parameters_by_arithmetic():
    config = LoraMoeConfig(num_experts=4, r=[1, 2, 3, 4], top_k=2, alpha=8)
    text = repr(LoraMoeLinear(nn.Linear(10, 6), config))
    total = 10 * (10 + 6) + 4 * 10
    assert f"parameters={total:,} ({total - 3 * 16:,} per token)" in text
    assert "num_experts=4, top_k=2, r=(1, 2, 3, 4), alpha=8" in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters", ["narrow", "fp32"])
def test_narrow_models(dtype, adapters):
    layer = make().to(dtype)
    if adapters == "fp32":
        for name in PARAMETERS:
            layer.get_parameter(name).data = layer.get_parameter(name).data.float()
    x = tokens(8).to(dtype)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == dtype
    wide = copy.deepcopy(layer).float()
    assert_accurate("y", y, by_loop(wide, x)[0], units=4)
    for name in PARAMETERS:
        parameter = layer.get_parameter(name)
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.any()
    assert layer.routing.logits.dtype == torch.float32


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_adapters_are_fp32_or_wider(base):
    """As in PEFT, and all of the same dtype: FSDP2 refuses trainable parameters of mixed dtypes."""
    layer = LoraMoeLinear(nn.Linear(4, 4, dtype=base), CONFIGS["selection-bias"])
    want = {torch.float64 if base == torch.float64 else torch.float32}
    assert {layer.get_parameter(name).dtype for name in PARAMETERS} == want
    assert {layer.selection_bias.dtype, layer.scaling.dtype} == want


@pytest.mark.parametrize(
    "asked, got",
    [("base", torch.bfloat16), (torch.float16, torch.float16), ("float64", torch.float64)],
    ids=str,
)
def test_adapter_dtype_on_request(asked, got):
    config = LoraMoeConfig(num_experts=4, r=3, router_bias=True, adapter_dtype=asked)
    layer = LoraMoeLinear(nn.Linear(4, 4, dtype=torch.bfloat16), config)
    assert layer.lora_A.dtype == layer.lora_B.dtype == got
    router = torch.float64 if got == torch.float64 else torch.float32
    assert layer.router_weight.dtype == layer.router_bias.dtype == router


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_scaling_is_never_rounded(move):
    """alpha / r = 16 / 3 is not representable in bf16."""
    layer = move(LoraMoeLinear(nn.Linear(8, 8), LoraMoeConfig(num_experts=2, r=3, alpha=16)))
    assert torch.equal(layer.scaling, torch.full((2,), 16 / 3))


def test_routing_lives_for_one_step():
    layer, x = make(), tokens(5)
    layer(x).sum().backward()
    old = weakref.ref(layer.routing.weights)
    layer(x)
    assert old() is None


@pytest.mark.parametrize("rows", [6, 3], ids=["per-token", "per-sample"])
def test_given_routing(rows):
    layer, x = make(), tokens(3, 2)
    ids = torch.tensor([2, -1, 0, 1, 3, 3])[:rows]
    layer.routing_override = Routing.from_ids(ids, num_experts=4)
    a, b, _, _ = in_double(layer)
    per_token = ids.repeat_interleave(6 // rows).tolist()
    picked = [[(e, 1.0)] if e >= 0 else [] for e in per_token]
    base = layer.base_layer(x).flatten(0, 1)
    want = base.double() + experts_by_loop(layer.config, a, b, x.double().flatten(0, 1), picked)
    y = layer(x).flatten(0, 1)
    assert_accurate("y", y, want, units=8)
    idle = torch.tensor([e < 0 for e in per_token])
    assert torch.equal(y[idle], base[idle])
    assert layer.routing.indices.flatten().tolist() == per_token


def test_a_given_routing_of_another_size_is_refused():
    layer = make()
    layer.routing_override = Routing.from_ids(torch.zeros(2, dtype=torch.long), num_experts=4)
    with pytest.raises(ValueError, match=r"6 rows, one per token, or 3, one per sample.*got 2"):
        layer(tokens(3, 2))


def test_given_gates_receive_their_gradient():
    layer, x = make(), tokens(5)
    gates = torch.rand(5, 4, generator=torch.Generator().manual_seed(4)).requires_grad_()
    layer.routing_override = Routing.from_gates(gates)
    layer(x).sum().backward()
    a, b, _, _ = in_double(layer)
    twin = gates.detach().double().requires_grad_()
    picked = [[(e, twin[t, e]) for e in range(4)] for t in range(5)]
    experts_by_loop(layer.config, a, b, x.double(), picked).sum().backward()
    assert_accurate("dgates", gates.grad, twin.grad, units=16)
