"""inject, remove, injected and set_routing: which objects they change and which they must not."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import lora_moe
from lora_moe import LoraMoeConfig, LoraMoeLinear, Routing, inject, injected, remove, set_routing

from ..support.injected import Attention, Model, config


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def randomise(model):
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B)


def test_the_model_still_computes_the_same_until_b_changes(model):
    want = model(IDS)
    inject(model, config("q_proj", "v_proj", "shared", "head"))
    assert torch.equal(model(IDS), want)
    randomise(model)
    assert not torch.allclose(model(IDS), want)


def test_a_shared_module_stays_shared(model):
    inject(model, config("alias"))
    assert isinstance(model.shared, LoraMoeLinear) and model.alias is model.shared
    assert list(injected(model)) == ["shared"]
    inject(other := Model(), config("shared", "q_proj", exclude_modules=("alias",)))
    assert other.alias is other.shared and type(other.shared) is nn.Linear


def test_a_linear_inside_another_is_replaced_in_place():
    class Outer(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return super().forward(self.inner(x))

    model = nn.ModuleDict({"outer": Outer()})
    before = list(model.named_modules())
    inject(model, config("outer", "inner"))
    assert list(injected(model)) == ["outer", "outer.base_layer.inner"]
    assert list(remove(model).named_modules()) == before


def test_a_shared_block_keeps_one_adapter():
    block = Attention()
    model = nn.ModuleDict({"encoder": block, "decoder": block})
    inject(model, config("q_proj"))
    assert model["encoder"].q_proj is model["decoder"].q_proj
    assert len(injected(model)) == 1


def test_tied_weights_stay_tied(model):
    inject(model, config("q_proj", "head"))
    assert model.head.weight is model.embed.weight


def test_only_the_adapters_train(model):
    model.layers[0].norm.requires_grad_(True)
    inject(model, config("q_proj"))
    training = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert training == {"lora_A", "lora_B", "router_weight"}
    inject(free := Model(), config("q_proj"), freeze=False)
    assert all(p.requires_grad for p in free.parameters())


def test_a_second_configuration_for_other_modules(model):
    inject(model, config("q_proj"))
    first = model.layers[0].q_proj
    first.router_weight.requires_grad_(False)
    inject(model, LoraMoeConfig(num_experts=2, r=[1, 3], target_modules=["v_proj"]))
    assert model.layers[0].q_proj is first and first.lora_A.requires_grad
    assert not first.router_weight.requires_grad  # set by the user
    assert model.layers[0].v_proj.config.num_experts == 2


def test_what_was_replaced_is_logged(model, caplog):
    inject(model, config("v_proj"))
    with caplog.at_level(logging.INFO, logger="lora_moe.injection"):
        inject(model, config("1.q_proj", "shared"))
    (record,) = caplog.records
    assert record.getMessage() == "2 modules replaced: layers.1.q_proj, shared"


@pytest.mark.parametrize("pattern", ["q_proj", r"^.*q_proj", r"^.*base_layer"])
def test_no_module_is_injected_twice(model, pattern):
    inject(model, config("q_proj"))
    with pytest.raises(ValueError, match="already has experts"):
        inject(model, config(pattern))
    assert all(type(layer.base_layer) is nn.Linear for layer in injected(model).values())


def test_remove_restores_the_objects(model):
    before, want = list(model.named_modules(remove_duplicate=False)), model(IDS)
    inject(model, config("q_proj", "shared"))
    randomise(model)
    assert not torch.allclose(model(IDS), want)
    assert remove(model) is model
    assert list(model.named_modules(remove_duplicate=False)) == before
    assert torch.equal(model(IDS), want)
    with pytest.raises(ValueError, match="got none"):
        remove(model)


def test_a_single_layer_cannot_be_removed_from_itself():
    layer = LoraMoeLinear(nn.Linear(4, 4), config())
    with pytest.raises(ValueError, match="base_layer"):
        remove(layer)


def test_task_ids_pick_one_expert_per_sample(model):
    inject(model, config("q_proj", "v_proj"))
    randomise(model)
    set_routing(model, task_ids=torch.tensor([3, -1]))
    y = model(IDS)
    for layer in injected(model).values():
        assert layer.routing.indices.flatten().tolist() == [3, 3, 3, -1, -1, -1]
    for layer in injected(model).values():  # only expert 3 may matter, in sample 0
        layer.lora_B.data[:6] = 1e3
    assert torch.equal(model(IDS), y)
    base = remove(model)(IDS)
    assert torch.equal(y[1], base[1]) and not torch.allclose(y[0], base[0])


def test_routing_stays_until_replaced_and_can_be_cleared(model):
    inject(model, config("q_proj"))
    randomise(model)
    free = model(IDS)
    set_routing(model, task_ids=torch.tensor([0, 1]))
    assert all(
        layer.routing is None for layer in injected(model).values()
    )  # inject clears the routing of the last forward
    fixed = model(IDS)
    assert torch.equal(model(IDS), fixed) and not torch.allclose(fixed, free)
    set_routing(model, task_ids=torch.tensor([2, 1]))
    assert not torch.allclose(model(IDS)[0], fixed[0]) and torch.equal(model(IDS)[1], fixed[1])
    set_routing(model)
    assert torch.equal(model(IDS), free)


def test_one_routing_for_all_layers_with_gradients(model):
    inject(model, config("q_proj"))
    randomise(model)
    gates = torch.rand(2, 4, requires_grad=True)
    set_routing(model, routing=Routing.from_gates(gates))  # one row per sample
    model(IDS).square().sum().backward()
    assert gates.grad.all()
    layer = model.layers[1].q_proj
    assert torch.equal(layer.routing.weights, gates.repeat_interleave(3, 0))


def test_replay_by_name(model):
    inject(model, config("q_proj", "v_proj"))
    randomise(model)
    want = model(IDS)
    replay = {name: layer.routing for name, layer in injected(model).items()}
    for layer in injected(model).values():
        nn.init.normal_(layer.router_weight, std=5.0)
    assert not torch.allclose(model(IDS), want)
    set_routing(model, routing=replay)
    assert torch.allclose(model(IDS), want, atol=1e-6)
    assert all(layer.routing.logits is None for layer in injected(model).values())
    one = dict(list(replay.items())[:1])
    set_routing(model, routing=one)
    assert [name for name, layer in injected(model).items() if layer.routing_override] == list(one)


def test_layers_may_have_different_numbers_of_experts(model):
    inject(model, config("q_proj"))
    inject(model, LoraMoeConfig(num_experts=2, r=2, target_modules=["v_proj"]))
    set_routing(model, task_ids=torch.tensor([1, 0]))
    model(IDS)
    assert [layer.routing.num_experts for layer in injected(model).values()] == [4, 2] * 3


def test_refused_routings_change_nothing(model):
    with pytest.raises(ValueError, match="got none"):
        set_routing(model, task_ids=torch.tensor([0]))
    inject(model, config("q_proj"))
    set_routing(model, task_ids=torch.tensor([1, 1]))
    routing = Routing.from_ids(torch.tensor([0, 0]), num_experts=4)
    other = Routing.from_ids(torch.tensor([0, 0]), num_experts=5)
    good, path = {"layers.0.q_proj": routing}, "layers.1.q_proj"
    for arguments, message in [
        ({"task_ids": torch.tensor([0]), "routing": routing}, "got both"),
        ({"routing": other}, "4 experts for layers.0.q_proj, got 5"),
        ({"routing": good | {path: other}}, f"4 experts for {path}, got 5"),
        ({"routing": good | {"layers.9.q_proj": routing}}, "layers.9.q_proj"),
        ({"routing": good | {path: "router"}}, "got str"),
    ]:
        with pytest.raises(ValueError, match=message):
            set_routing(model, **arguments)
    with pytest.raises(TypeError, match="integers"):
        set_routing(model, task_ids=torch.tensor([0.5]))
    assert all(
        layer.routing_override.indices.tolist() == [[1], [1]] for layer in injected(model).values()
    )


def test_ids_out_of_range_are_named(model):
    inject(model, config("q_proj"))
    for ids, wrong in (([0, 4], "4"), ([0, 7], "7"), ([-2, 0], "-2")):
        with pytest.raises(ValueError, match=rf"task_ids: expected .* in \[-1, 4\), got {wrong}"):
            set_routing(model, task_ids=torch.tensor(ids))
    with pytest.raises(TypeError, match="task_ids: expected a tensor of integers"):
        set_routing(model, task_ids="0")


def test_public_names():
    for name in lora_moe.__all__:
        assert getattr(lora_moe, name) is not None
