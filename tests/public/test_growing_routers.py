"""grow: task routers, custom routers and generated weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_moe import (
    Routing,
    fill_expert,
    grow,
    injected,
    load_adapter,
    save_adapter,
    set_routing,
    use_routing,
)
from lora_moe.components import TensorSpec, register
from lora_moe.routers import PerTaskRouter, Router, SequenceRouter, TaskRouter, UniversalRouter

from ..support.growing import D, E, Model, X, by_expert, close, run, state, with_experts

TASKS = torch.arange(6) % 3
PER_TASK = {
    "per task": PerTaskRouter(num_tasks=3),
    "per task, known": PerTaskRouter(num_tasks=3, known_experts=(2, 3, 3)),
    "table": TaskRouter(num_tasks=3),
    "weights": TaskRouter(num_tasks=3, table="weights"),
    "by sequence": SequenceRouter(then=PerTaskRouter(num_tasks=3)),
}


@pytest.mark.parametrize("router", ["fresh", "keep"])
@pytest.mark.parametrize("kind", PER_TASK)
def test_task_routers_made_earlier_do_not_see_new_experts(kind, router, tmp_path):
    model = with_experts(router=PER_TASK[kind])
    before, expected = state(model), run(model, task_ids=TASKS)
    grow(model, 2, router=router)
    close(run(model, task_ids=TASKS), expected)
    for key, old in before.items():
        assert torch.equal(state(model)[key][tuple(map(slice, old.shape))], old)
    save_adapter(model, tmp_path)
    again = load_adapter(Model(), tmp_path)
    assert torch.equal(run(again, task_ids=TASKS), run(model, task_ids=TASKS))
    ids = torch.full((len(X),), E)
    new = Routing.from_ids(ids, num_experts=E + 2)
    none = Routing.from_ids(torch.full_like(ids, -1), num_experts=E + 2)
    assert torch.equal(run(model, routing=new), run(model, routing=none))


@pytest.mark.parametrize(
    "kind",
    [UniversalRouter(num_tasks=2), TaskRouter(num_tasks=3, table="expert")],
    ids=lambda k: k.kind,
)
def test_new_tasks_for_new_experts(kind):
    model = with_experts(router=kind)
    N = kind.num_tasks
    tasks = torch.arange(6) % N
    expected = run(model, task_ids=tasks)
    set_routing(model, task_ids=tasks)
    grow(model, 2)
    close(run(model), expected)
    set_routing(model)
    close(run(model, task_ids=tasks), expected)
    assert model.up.config.num_tasks == N + 2
    run(model, task_ids=torch.full((6,), N + 1))


def test_custom_routers():
    from dataclasses import dataclass

    @register
    @dataclass(frozen=True)
    class Columns(Router):
        kind = "test columns"

        def tensors(self, config, D_in, D_out):
            return {"router_columns": TensorSpec((D_in, config.num_experts))}

        def route(self, x, tensors, batch):
            return Routing.from_logits(x.flatten(0, -2) @ tensors["router_columns"], 1)

    @register
    @dataclass(frozen=True)
    class Pairs(Columns):
        kind = "test pairs"

        def tensors(self, config, D_in, D_out):
            return {"router_columns": TensorSpec((D_in, config.num_experts**2))}

    try:
        model = with_experts(router=Columns())
        before = state(model)
        with pytest.raises(ValueError, match="router: expected 'fresh' for a Columns"):
            grow(model, 1, router="keep")
        grow(model, 1)
        assert torch.equal(
            state(model)["up", "router_columns"][:, :E], before["up", "router_columns"]
        )
        run(model)
        with pytest.raises(ValueError, match=r"one row or column per expert, got \(8, 9\)"):
            grow(with_experts(router=Pairs()), 1)
    finally:
        for kind in ("test columns", "test pairs"):
            Router.known.pop(kind)


def test_refused_growth_changes_nothing():
    model = with_experts()
    before = state(model)
    for wrong in (0, -1, True, 1.5, "2"):
        with pytest.raises(ValueError, match="n: expected an integer of at least 1"):
            grow(model, wrong)
    with pytest.raises(ValueError, match="router: expected 'fresh' or 'keep'"):
        grow(model, 1, router="freeze")
    with pytest.raises(ValueError, match="num_experts: expected an integer"):
        grow(model, 5000)
    with pytest.raises(ValueError, match="expected the unwrapped model, got a DataParallel"):
        grow(nn.DataParallel(model), 1)
    with pytest.raises(ValueError, match="optimizer: expected a torch optimizer, got dict"):
        grow(model, 1, optimizer={})
    ids = torch.zeros(6, dtype=torch.long)
    with use_routing(model, task_ids=ids), pytest.raises(ValueError, match="a use_routing block"):
        grow(model, 1)
    model.up.lora_A.ds_id = 1  # as ZeRO-3 marks its parameters
    with pytest.raises(ValueError, match="up: sharded parameters"):
        grow(model, 1)
    del model.up.lora_A.ds_id
    nn.utils.parametrizations.weight_norm(model.up, "lora_B")
    with pytest.raises(ValueError, match="up: pruned or parametrized tensors"):
        grow(model, 1)
    with pytest.raises(ValueError, match="got none"):
        grow(Model(), 1)
    del before["up", "lora_B"]
    assert all(torch.equal(state(model)[key], t) for key, t in before.items())
    assert model.down.config.num_experts == E


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("bank", ["equal", "unequal", "shared"])
def test_generated_weights(bank, prefix):
    model = with_experts(bank)
    other = [by_expert(model, e) for e in (0, 2)]
    g, tensors, updates = torch.Generator().manual_seed(1), {}, {}
    for path, layer in injected(model).items():
        r = layer.config.ranks[1]
        A, B = (
            torch.randn(r, layer.in_features, generator=g),
            torch.randn(layer.out_features, r, generator=g),
        )
        tensors[f"{prefix}{path}.lora_B.weight"] = B
        if bank == "shared":
            A = layer.lora_A.detach()
        else:
            tensors[f"{prefix}{path}.lora_A.weight"] = A
        updates[path] = B @ A

    def expected(scales):
        def at(path, x):
            return getattr(model, path).base_layer(x) + scales[path] * x @ updates[path].T

        with torch.no_grad():
            return X + at("down", torch.tanh(at("up", X)))

    fill_expert(model, 1, tensors)
    own = {path: layer.scales[1] for path, layer in injected(model).items()}
    torch.testing.assert_close(by_expert(model, 1), expected(own), rtol=1e-5, atol=1e-5)
    fill_expert(model, 1, tensors, scale=0.5)
    torch.testing.assert_close(
        by_expert(model, 1), expected(dict.fromkeys(own, 0.5)), rtol=1e-5, atol=1e-5
    )
    for e, output in zip((0, 2), other):
        assert torch.equal(by_expert(model, e), output)


def test_generated_weights_that_do_not_fit():
    model = with_experts()
    before = state(model)
    tensors = {}
    for path, layer in injected(model).items():
        tensors[f"{path}.lora_A.weight"] = torch.ones(2, layer.in_features)
        tensors[f"{path}.lora_B.weight"] = torch.ones(layer.out_features, 2)
    key = "up.lora_A.weight"
    cases = [
        ({k: t for k, t in tensors.items() if k != key}, f"{key}: missing"),
        (tensors | {"up.lora_C.weight": torch.ones(1)}, "up.lora_C.weight': not in the model"),
        (tensors | {key: torch.ones(3, D)}, r"expected \(2, 8\), got \(3, 8\)"),
        (tensors | {key: torch.full((2, D), float("nan"))}, "expected finite values"),
        (
            tensors | {key: torch.ones(2, D, dtype=torch.int64)},
            "a floating-point tensor, got torch.int64",
        ),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            fill_expert(model, 1, given)
    for wrong in (E, -1, "x", [0, 1]):
        with pytest.raises(ValueError, match=r"expert: expected one id in \[0, 3\)"):
            fill_expert(model, wrong, tensors)
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        fill_expert(model, 1, tensors, scale=float("nan"))
    assert all(torch.equal(t, before[k]) for k, t in state(model).items())
