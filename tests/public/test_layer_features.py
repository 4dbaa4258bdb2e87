"""LoraMoeLinear with PyTorch's features: dropout, autocast, copies, compile, checkpoints."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_moe import LoraMoeConfig, LoraMoeLinear, Routing

from ..support.compare import assert_accurate, relative_error
from ..support.layers import (
    CONFIGS,
    D_IN,
    D_OUT,
    PARAMETERS,
    by_loop,
    every_config,
    in_double,
    make,
    tokens,
)


def dropout_layer():
    return make(LoraMoeConfig(num_experts=4, r=3, alpha=4, dropout=0.5))


def test_dropout_reaches_the_experts_and_not_the_router():
    layer, x = dropout_layer(), tokens(6)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    mask = nn.functional.dropout(torch.ones_like(x), 0.5).double()  # 0 or 2
    want, _ = by_loop(layer, x, mask)
    assert_accurate("y", y, want, units=8)
    assert_accurate("logits", layer.routing.logits, x.double() @ in_double(layer)[2].T, units=4)
    assert relative_error(y, by_loop(layer, x)[0]) > 0.05


def test_dropout_only_while_training():
    layer, x = dropout_layer().eval(), tokens(6)
    assert torch.equal(layer(x), layer(x))
    assert_accurate("y", layer(x), by_loop(layer, x)[0], units=8)


def test_dropout_uses_one_mask_in_forward_and_backward():
    """With a fixed routing and mask, y is linear in x and in B, so finite differences are exact."""
    layer, x, direction = dropout_layer(), tokens(6), tokens(6, seed=5)
    layer.routing_override = Routing.from_ids(torch.tensor([0, 1, 2, 3, -1, 0]), num_experts=4)
    dy = torch.randn(6, D_OUT, generator=torch.Generator().manual_seed(6))

    def run(x):
        torch.manual_seed(3)
        return layer(x)

    leaf = x.clone().requires_grad_()
    run(leaf).backward(dy)
    step = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        along_x = (run(x + direction) - run(x)).double().mul(dy).sum()
        before = run(x)
        layer.lora_B += step
        along_b = (run(x) - before).double().mul(dy).sum()
    assert float((leaf.grad * direction).sum()) == pytest.approx(float(along_x), rel=1e-4)
    assert float((layer.lora_B.grad * step).sum()) == pytest.approx(float(along_b), rel=1e-4)


class KeepsItsDtype(nn.Linear):
    """A base that autocast does not affect: bitsandbytes' linears return x's dtype."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


@pytest.mark.parametrize("kind", [nn.Linear, KeepsItsDtype])
def test_autocast_follows_the_base(kind):
    """The output is bf16 where the base returns bf16, and as accurate as fp32 where it returns fp32."""
    layer, x = make(base=kind(D_IN, D_OUT)), tokens(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    narrow = kind is nn.Linear
    assert y.dtype == (torch.bfloat16 if narrow else torch.float32)
    y.float().sum().backward()
    assert all(layer.get_parameter(name).grad.dtype == torch.float32 for name in PARAMETERS)
    if narrow:  # autocast rounds x and all weights except the router's
        x = x.bfloat16()
        for p in (layer.weight, layer.bias, layer.lora_A, layer.lora_B):
            p.data = p.data.bfloat16().float()
    assert_accurate("y", y, by_loop(layer, x)[0], units=4 if narrow else 8)


def test_from_the_meta_device():
    layer = LoraMoeLinear(nn.Linear(D_IN, D_OUT, device="meta"), CONFIGS["unequal-ranks"])
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    assert torch.equal(layer.scaling, torch.tensor([5 / 1, 5 / 6, 5 / 2]))
    layer.load_state_dict(make(CONFIGS["unequal-ranks"]).state_dict())
    x = tokens(4)
    assert torch.equal(layer(x), make(CONFIGS["unequal-ranks"])(x))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_after_a_forward(copier):
    layer, x = make(), tokens(5)
    gates = torch.rand(5, 4, requires_grad=True) * 1.0
    layer.routing_override = Routing.from_gates(gates)
    y = layer(x)
    twin = copier(layer)
    assert twin.routing is None and not twin.routing_override.weights.requires_grad
    assert layer.routing is not None and layer.routing_override.weights.requires_grad
    assert torch.equal(twin(x), y)
    twin.lora_B.data.zero_()
    assert layer.lora_B.any()


@every_config
def test_state_dict_round_trip(config):
    layer, other, x = make(config, seed=0), make(config, seed=1), tokens(5)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("name", ["defaults", "unequal-ranks", "dropout", "given"])
def test_compiles_whole_with_a_dynamic_number_of_tokens(name):
    layer = dropout_layer() if name == "dropout" else make(CONFIGS.get(name, CONFIGS["defaults"]))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    for samples in (6, 7, 9):
        if name == "given":
            layer.routing_override = Routing.from_ids(torch.arange(samples) % 4, num_experts=4)
        results = []
        for run in (layer, compiled):
            x = tokens(samples, 3).requires_grad_()
            layer.zero_grad()
            torch.manual_seed(0)
            y = run(x)
            y.square().sum().backward()
            results.append([y, x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.routing.weights])
        for eager, traced in zip(*results, strict=True):
            assert relative_error(traced, eager) < 1e-6
    assert len(graphs) <= 2  # one for all sizes, and possibly one for the first size


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["defaults", "dropout", "given"])
def test_checkpoint_gives_the_same_gradients(reentrant, name):
    layer = dropout_layer() if name == "dropout" else make()
    if name == "given":
        layer.routing_override = Routing.from_ids(torch.tensor([3, 0]), num_experts=4)

    def gradients(run):
        x = tokens(2, 3).requires_grad_()
        layer.zero_grad()
        torch.manual_seed(0)
        run(x).square().sum().backward()
        return [x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.router_weight.grad]

    plain = gradients(layer)
    saved = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    for one, other in zip(plain, saved, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recompute_leaves_no_trace(reentrant):
    """What a checkpoint recomputes must not be kept alive through `routing`, nor counted twice."""
    layer, x = make(), tokens(6).requires_grad_()
    y = checkpoint(lambda x: layer(x).square(), x, use_reentrant=reentrant)  # the square saves y
    routing = layer.routing
    y.sum().backward()
    assert layer.routing is routing
    assert int(routing.counts.sum()) == 6 * 2


def test_resuming_continues_bit_for_bit(tmp_path):
    """Twenty steps give the same weights and moments as ten, a checkpoint on disk and ten more."""
    config = LoraMoeConfig(num_experts=4, r=2, top_k=2)
    x = torch.randn(24, 12, generator=torch.Generator().manual_seed(1))

    def fresh():
        torch.manual_seed(0)
        layer = LoraMoeLinear(nn.Linear(12, 8), config)
        return layer, torch.optim.AdamW(layer.parameters(), lr=1e-2)

    def train(layer, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (layer(x) - x[:, :8]).square().mean().backward()
            optimizer.step()

    whole, optimizer = fresh()
    train(whole, optimizer, 20)
    half, optimizer = fresh()
    train(half, optimizer, 10)
    torch.save([half.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    resumed, optimizer = fresh()
    weights, moments = torch.load(tmp_path / "checkpoint.pt")
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    train(resumed, optimizer, 10)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
