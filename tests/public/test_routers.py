"""The routers: each equals its formula, forward and gradients, and refuses what it does not support."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, LoraMoeLinear, Routing, inject, set_routing, use_routing
from lora_moe.components import TensorSpec, register
from lora_moe.middle import Middle
from lora_moe.routers import (
    PerTaskRouter,
    Router,
    SequenceRouter,
    TaskRouter,
    TokenRouter,
    UniversalRouter,
)

B, L, D_IN, D_OUT, E, R = 3, 4, 10, 6, 4, 2
TASKS = torch.tensor([1, -1, 0])


@register
@dataclasses.dataclass(frozen=True)
class Scaled(Middle):
    """The gate times a scale that depends on the task."""

    kind: ClassVar[str] = "scaled, of a test"
    num_tasks: int

    def tensors(self, config, D_in, D_out):
        return {"middle_scale": TensorSpec((self.num_tasks,), nn.init.ones_)}

    def mix(self, x, base, routing, tensors, batch):
        scale = tensors["middle_scale"][batch.tasks(x)].view(*x.shape[:-1], 1)
        layer = batch.layer
        gates = torch.zeros(len(routing.weights), E, dtype=x.dtype)
        gates = gates.scatter(1, routing.indices.long(), routing.weights)  # (T, E)
        rows = gates.repeat_interleave(R, 1).view(*x.shape[:-1], -1)
        return base + scale * 2 * ((x @ layer.lora_A.T) * rows) @ layer.lora_B


ROUTERS = {
    "logits": {"router": TaskRouter(2), "top_k": 2, "temperature": 0.5},
    "dense-sigmoid": {"router": TaskRouter(2), "top_k": E, "gate": "sigmoid", "renormalize": False},
    "weights": {"router": TaskRouter(2, "weights")},
    "expert": {"router": TaskRouter(2, "expert")},
    "per-task": {"router": PerTaskRouter(2), "top_k": 2},
    "per-task-grown": {"router": PerTaskRouter(2, (3, 4)), "top_k": 3},
    "universal": {"router": UniversalRouter(3)},
    "universal-sigmoid": {"router": UniversalRouter(3, "sigmoid")},
    "universal-sum": {"router": UniversalRouter(3, "sum")},
    "first": {"router": SequenceRouter("first"), "top_k": 2, "router_bias": True},
    "mean": {"router": SequenceRouter("mean"), "top_k": 1},
    "mean-per-task": {"router": SequenceRouter("mean", PerTaskRouter(2)), "top_k": 2},
    "middle": {"middle": Scaled(3), "top_k": 2},
}


def made(name, **fields):
    """A layer in fp64 with random experts and router."""
    torch.manual_seed(0)
    config = LoraMoeConfig(num_experts=E, r=R, alpha=2.0 * R, **ROUTERS[name] | fields)
    layer = LoraMoeLinear(nn.Linear(D_IN, D_OUT, dtype=torch.float64), config)
    for parameter in layer.parameters(recurse=False):
        nn.init.normal_(parameter)
    return layer


def topk(logits, k, normalize=True):
    """softmax over all experts, the k largest divided by their sum.  (..., E) -> (..., E)"""
    p = logits.softmax(-1)
    picked = torch.zeros_like(p).scatter(-1, p.topk(k).indices, 1)
    p = p * picked
    return p / p.sum(-1, keepdim=True) if normalize else p


def gates(name, layer, x):
    """(B, L, E): the docstrings' formulas, in loops over samples."""
    own = dict(layer.named_parameters())
    out = []
    for b, t in enumerate(TASKS.tolist()):
        rows = x[b]  # (L, D_in)
        if name == "middle":
            g = topk(rows @ own["router_weight"].T, 2) * own["middle_scale"][t]
        elif name.startswith("universal"):
            both = rows.new_ones(L, 2)
            if name != "universal-sum":
                logits = rows @ own["router_weight"].T
                both = logits.softmax(1) if name == "universal" else logits.sigmoid()
            g = torch.cat([both[:, :1], torch.zeros(L, E - 1, dtype=x.dtype)], 1)
            if t >= 0:
                g = g + both[:, 1:] * nn.functional.one_hot(torch.tensor(t + 1), E)
        elif name == "first":
            g = topk(rows[:1] @ own["router_weight"].T + own["router_bias"], 2).expand(L, E)
        elif name == "mean":
            g = topk(rows.mean(0, keepdim=True) @ own["router_weight"].T, 1, False).expand(L, E)
        elif t < 0:
            g = rows.new_zeros(L, E)
        elif name == "expert":
            g = nn.functional.one_hot(torch.tensor(t), E).expand(L, E)
        elif name.startswith(("per-task", "mean-per")):
            rows = rows.mean(0, keepdim=True).expand(L, -1) if name.startswith("mean") else rows
            own_logits = rows @ own[f"router_weight_{t}"].T
            g = nn.functional.pad(
                topk(own_logits, layer.config.top_k), (0, E - own_logits.shape[1])
            )
        else:
            row = own["router_table"][t]
            kinds = {"weights": row, "dense-sigmoid": row.sigmoid(), "logits": topk(row / 0.5, 2)}
            g = kinds[name].expand(L, E)
        out.append(g)
    return torch.stack(out)


@pytest.mark.parametrize("name", ROUTERS)
def test_forward_and_gradients_are_the_formulas(name):
    layer, x = made(name), torch.randn(B, L, D_IN, dtype=torch.float64, requires_grad=True)
    trained = dict(layer.named_parameters(recurse=False))
    with use_routing(layer, task_ids=TASKS) if layer.config.num_tasks else nullcontext():
        y = layer(x)
    rows = gates(name, layer, x).repeat_interleave(R, -1)  # (B, L, E r)
    want = layer.base_layer(x) + 2 * ((x @ layer.lora_A.T) * rows) @ layer.lora_B
    assert (y - want).abs().max() < 1e-12
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *trained.values()], dy)
    expected = torch.autograd.grad(want, [x, *trained.values()], dy, materialize_grads=True)
    for which, a, b in zip(["x", *trained], got, expected):
        assert (a - b).abs().max() < 1e-12, which


def nullcontext():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_configuration_survives_its_dict(name):
    config = made(name).config
    again = LoraMoeConfig.from_dict(config.to_dict())
    assert again == config and type(again.router) is type(config.router)
    assert hash(again) == hash(config)


def test_the_token_router_is_none():
    assert LoraMoeConfig(router=TokenRouter()) == LoraMoeConfig()


REFUSED = {
    "field-not-read": ({"router": TaskRouter(2, "expert"), "gate": "sigmoid"}, "gate"),
    "bias-not-read": ({"router": UniversalRouter(3), "selection_bias": True}, "selection_bias"),
    "not-a-router": ({"router": "task"}, "router"),
    "middle-as-router": ({"router": Scaled(3)}, "router"),
    "two-counts": ({"router": TaskRouter(2), "middle": Scaled(3)}, "num_tasks"),
    "kind": ({"router": {"kind": "none"}}, "kind"),
    "field": ({"router": {"kind": "task", "num_tasks": 2, "x": 1}}, "fields"),
    "no-tasks": ({"router": {"kind": "task"}}, "num_tasks"),
    "deep": ({"router": {"kind": "sequence", "then": {}}}, "kind"),
}


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoraMoeConfig(num_experts=E, **fields)


def test_components_in_components_have_a_bound():
    fields = {"kind": "token"}
    for _ in range(1000):
        fields = {"kind": "sequence", "then": fields}
    with pytest.raises(ValueError, match="router"):
        LoraMoeConfig(router=fields)


@pytest.mark.parametrize("tasks, count", [(0, 2), (True, 2), (70_000, 2), (5, E)])
def test_numbers_of_tasks(tasks, count):
    with pytest.raises(ValueError, match="num_tasks"):
        LoraMoeLinear(
            nn.Linear(4, 4), LoraMoeConfig(num_experts=E, router=TaskRouter(tasks, "expert"))
        )


def test_a_forward_without_tasks_says_what_to_call():
    with pytest.raises(RuntimeError, match="use_routing"):
        made("logits")(torch.randn(B, L, D_IN, dtype=torch.float64))


@pytest.mark.parametrize("ids", [[2], [-2], [[0, 1]]])
def test_task_ids_out_of_range(ids):
    with pytest.raises(ValueError, match="task_ids"):
        set_routing(made("logits"), task_ids=torch.tensor(ids))


def test_tasks_and_experts_in_one_model():
    """A task router takes task ids; a token router in the same model takes the ids as experts."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    task = LoraMoeConfig(num_experts=8, r=1, target_modules=("0",), router=TaskRouter(2, "expert"))
    token = LoraMoeConfig(num_experts=3, r=1, target_modules=("1",))
    inject(model, [task, token])
    with use_routing(model, task_ids=torch.tensor([1, 0])):
        model(torch.randn(2, 4))
    assert model[0].routing.indices.tolist() == [[1], [0]] and model[0].routing.num_experts == 8
    assert model[1].routing.indices.tolist() == [[1], [0]] and model[1].routing.num_experts == 3


def test_one_module_in_two_configurations():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    both = [LoraMoeConfig(target_modules=("0", "1")), LoraMoeConfig(target_modules=("1",))]
    with pytest.raises(ValueError, match="1 in two"):
        inject(model, both)
    assert type(model[0]) is nn.Linear


def test_a_routing_overrides_a_task_router_and_tasks_override_a_routing():
    layer, x = made("expert"), torch.randn(2, D_IN, dtype=torch.float64)
    routing = Routing.from_ids(torch.tensor([3, 3]), num_experts=E)
    with use_routing(layer, task_ids=torch.tensor([0, 1])):
        with use_routing(layer, routing=routing):
            layer(x)
        assert layer.routing.indices.tolist() == [[3], [3]]
    with use_routing(layer, routing=routing), use_routing(layer, task_ids=torch.tensor([0, 1])):
        layer(x)
    assert layer.routing.indices.tolist() == [[0], [1]]


def test_a_kind_is_registered_once():
    with pytest.raises(ValueError, match="task"):

        @register
        @dataclasses.dataclass(frozen=True)
        class Other(Router):
            kind: ClassVar[str] = "task"

    with pytest.raises(TypeError, match="frozen"):
        register(type("Plain", (Router,), {"kind": "plain"}))


def test_a_tensor_name_of_the_layer_is_refused():
    @register
    @dataclasses.dataclass(frozen=True)
    class Greedy(Router):
        kind: ClassVar[str] = "greedy, of a test"

        def tensors(self, config, D_in, D_out):
            return {"weight": TensorSpec((D_in,))}

    with pytest.raises(ValueError, match="weight: expected a tensor name"):
        LoraMoeLinear(nn.Linear(4, 4), LoraMoeConfig(router=Greedy()))
