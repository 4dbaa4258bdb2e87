"""More experts: existing rows stay bitwise unchanged, optimizers are updated, routers follow the option."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_moe import (
    LoraMoeConfig,
    Routing,
    aux_loss,
    fill_expert,
    freeze_experts,
    grow,
    inject,
    injected,
    load_adapter,
    merge,
    save_adapter,
    set_routing,
    to_peft,
    use_routing,
)
from lora_moe.parts import TensorSpec, register
from lora_moe.routers import PerTaskRouter, Router, SequenceRouter, TaskRouter, UniversalRouter

D, E = 8, 3
X = torch.randn(6, 5, D, generator=torch.Generator().manual_seed(0))
BANKS = {
    "equal": {"r": 2},
    "unequal": {"r": (1, 3, 2), "alpha": (4.0, 8.0, 2.0)},
    "shared": {"r": 2, "shared_a": True},
    "dense": {"r": 2, "top_k": 3, "renormalize": False},
    "bias": {"r": 2, "router_bias": True, "selection_bias": True, "temperature": 2.0},
    "sigmoid": {"r": 2, "gate": "sigmoid", "top_k": 1},
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def with_experts(bank="equal", **fields):
    names = {"num_experts": E, "target_modules": ("up", "down")}
    model = inject(Model(), LoraMoeConfig(**names | BANKS[bank] | fields))
    with torch.no_grad():
        for layer in injected(model).values():
            for name, tensor in layer.adapter_state().items():
                nn.init.normal_(tensor, std=0.5 if name == "lora_A" else 1.0)
    return model


def state(model):
    return {
        (path, name): tensor.detach().clone()
        for path, layer in injected(model).items()
        for name, tensor in layer.adapter_state().items()
    }


@torch.no_grad()
def run(model, **routing):
    if not routing:
        return model(X)
    with use_routing(model, **routing):
        return model(X)


def by_expert(model, e):
    return run(model, task_ids=torch.full((len(X),), e))


def close(got, expected, bound=1e-6):
    """As a share of the largest output, which is some 30."""
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= bound, float(error)


# --- what was there ----------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["fresh", "keep"])
@pytest.mark.parametrize("bank", BANKS)
def test_old_rows_keep_their_bits_and_old_experts_their_outputs(bank, router):
    model = with_experts(bank)
    freeze_experts(model, [1])
    before, outputs = state(model), [by_expert(model, e) for e in range(E)]
    routed = run(model)
    assert grow(model, 2, router=router) is model
    after = state(model)
    for key, old in before.items():
        new = after[key]
        assert torch.equal(new[tuple(map(slice, old.shape))], old), key
        if key[1] == "lora_B":
            assert new.shape[0] > old.shape[0] and not new[len(old) :].any()
    for e, output in enumerate(outputs):
        close(by_expert(model, e), output)
    for layer in injected(model).values():
        assert layer.config.num_experts == 5 and layer.frozen == (1,)
        assert layer.config.ranks[3:] == layer.config.ranks[2:3] * 2
        assert layer.scales[3:] == layer.scales[2:3] * 2
    if router == "keep":
        close(run(model), routed)
        for layer in injected(model).values():
            assert layer.routing.indices.max() < E and layer.config.top_k == BANKS[bank].get(
                "top_k", 2
            )
    elif bank == "dense":
        assert {layer.config.top_k for layer in injected(model).values()} == {5}


def test_a_new_expert_is_reached_by_the_caller_and_trains():
    model = grow(with_experts(), 1, router="keep")
    base = run(model, task_ids=torch.full((len(X),), -1))
    assert torch.equal(by_expert(model, E), base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = state(model)
    with use_routing(model, task_ids=torch.full((len(X),), E)):
        model(X).square().mean().backward()
    optimizer.step()
    after = state(model)
    assert (by_expert(model, E) - base).abs().max() > 1e-4
    for path in injected(model):
        for name in ("lora_A", "lora_B"):
            assert torch.equal(after[path, name][: 2 * E], before[path, name][: 2 * E])
        assert torch.equal(after[path, "router_bias"], before[path, "router_bias"])


def test_keep_holds_while_the_router_trains_on():
    model = grow(with_experts(), 2, router="keep")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    for _ in range(20):
        (model(X).square().mean() + aux_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert max(layer.routing.indices.max() for layer in injected(model).values()) < E


def test_save_and_load_after_growing(tmp_path):
    for router in ("fresh", "keep"):
        model = grow(with_experts("bias"), 2, router=router)
        freeze_experts(model, [0, 4])
        save_adapter(model, tmp_path)
        again = load_adapter(Model(), tmp_path)
        assert torch.equal(run(again), run(model)) and again.up.frozen == (0, 4)
        fresh = grow(with_experts("bias"), 2, router=router)
        assert torch.equal(run(load_adapter(fresh, tmp_path)), run(model))


def test_decisions_that_stand_and_copies():
    model = with_experts()
    set_routing(model, task_ids=torch.arange(6) % E)
    expected = run(model)
    grow(model, 1)
    close(run(model), expected)
    close(run(copy.deepcopy(model)), expected)
    set_routing(model, task_ids=torch.full((6,), E))
    assert torch.equal(run(model), run(model, task_ids=torch.full((6,), -1)))


def test_growing_twice_is_growing_once():
    model = with_experts()
    expected = by_expert(model, 2)
    grow(grow(model, 1), 2)
    assert model.up.config.num_experts == 6 and model.up.lora_A.shape == (12, D)
    close(by_expert(model, 2), expected)
    assert torch.equal(by_expert(model, 5), run(model, task_ids=torch.full((6,), -1)))


def test_other_functions_after_growing(tmp_path):
    model = grow(with_experts(), 1, router="keep")
    assert [p.name for p in to_peft(model, tmp_path)] == [f"expert_{e}" for e in range(4)]
    expected = by_expert(model, 1)
    close(merge(model, [0, 1, 0, 0])(X), expected)


def test_experts_of_peft_keep_where_they_came_from(tmp_path):
    from lora_moe import from_peft

    to_peft(with_experts(), tmp_path / "a")
    folders = [tmp_path / f"a/expert_{e}" for e in range(E)]
    model = grow(from_peft(Model(), folders), 1)
    to_peft(model, tmp_path / "b")
    for e in range(E):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            ours, theirs = (tmp_path / f"{f}/expert_{e}/{name}" for f in "ba")
            assert ours.read_bytes() == theirs.read_bytes()
    assert (tmp_path / "b/expert_3/adapter_config.json").exists()


# --- optimizers --------------------------------------------------------------------------------------


def groups(model):
    named = list(model.named_parameters())
    routers = [p for n, p in named if "router" in n and p.requires_grad]
    banks = [p for n, p in named if "lora_" in n]
    return [{"params": banks, "lr": 0.01}, {"params": routers, "lr": 0.02, "weight_decay": 0.0}]


def train(model, optimizer, steps=3):
    for _ in range(steps):
        (model(X).square().mean() + aux_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("bank", ["equal", "shared"])
@pytest.mark.parametrize("router", ["fresh", "keep"])
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adafactor"])
def test_an_optimizer_goes_on(kind, router, bank):
    model = with_experts(bank)
    more = {"SGD": {"momentum": 0.9}}.get(kind, {})
    optimizer = getattr(torch.optim, kind)(groups(model), **more)
    train(model, optimizer)
    old = {
        id(p): {k: v.clone() for k, v in s.items() if torch.is_tensor(v)}
        for p, s in optimizer.state.items()
    }
    layer = model.up
    kept = {n: getattr(layer, n) for n in ("lora_A", "lora_B", "router_weight")}
    if kind == "Adafactor":
        before = state(model)
        with pytest.raises(ValueError, match="optimizer: expected state in the parameter's shape"):
            grow(model, 2, router=router, optimizer=optimizer)
        assert all(torch.equal(t, before[key]) for key, t in state(model).items())
        return
    grow(model, 2, router=router, optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    for name, was in kept.items():
        new = getattr(layer, name)
        for key, value in old[id(was)].items():
            grown = optimizer.state[new][key]
            assert torch.equal(
                grown[tuple(map(slice, value.shape))] if value.dim() else grown, value
            )
            if value.dim() and new.shape != was.shape:
                assert grown.shape == new.shape and not grown[len(value) :].any()
    assert [id(p) for p in optimizer.param_groups[1]["params"]].count(id(layer.router_weight)) == 1
    if router == "keep":
        assert any(p is layer.router_bias for p in optimizer.param_groups[1]["params"])
    before = state(model)
    train(model, optimizer, 1)
    moved = {key[1] for key, t in state(model).items() if not torch.equal(t, before[key])}
    assert {"lora_A", "lora_B", "router_weight"} <= moved


def test_an_optimizer_that_is_not_told_raises():
    model = with_experts()
    stale = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    train(model, stale, 1)
    grow(model, 1)
    model(X).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"pass it to grow\(model, n, optimizer=\)"):
        stale.step()
    other.step()
    new = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, new, 1)


def test_what_does_not_train_is_as_it_was():
    model = with_experts()
    model.up.lora_A.requires_grad_(False)
    shared = with_experts("shared")
    A = shared.up.lora_A
    grow(model, 1)
    grow(shared, 1)
    assert not model.up.lora_A.requires_grad and model.up.lora_B.requires_grad
    assert shared.up.lora_A is A


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype):
    model = with_experts().to(dtype)
    x = X.to(dtype)
    with torch.no_grad():
        expected = model(x)
        grow(model, 2, router="keep")
        assert {t.dtype for t in state(model).values()} == {dtype}
        assert torch.equal(model(x), expected)


# --- routers -----------------------------------------------------------------------------------------

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


def test_routers_of_ones_own():
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
        with pytest.raises(ValueError, match=r"one row or column for each expert, got \(8, 9\)"):
            grow(with_experts(router=Pairs()), 1)
    finally:
        for kind in ("test columns", "test pairs"):
            Router.known.pop(kind)


# --- refusals ----------------------------------------------------------------------------------------


def test_what_cannot_grow_is_as_it_was():
    model = with_experts()
    before = state(model)
    for wrong in (0, -1, True, 1.5, "2"):
        with pytest.raises(ValueError, match="n: expected an integer of at least 1"):
            grow(model, wrong)
    with pytest.raises(ValueError, match="router: expected 'fresh' or 'keep'"):
        grow(model, 1, router="freeze")
    with pytest.raises(ValueError, match="num_experts: expected an integer"):
        grow(model, 5000)
    with pytest.raises(ValueError, match="expected the plain model, got DataParallel"):
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


# --- weights from elsewhere --------------------------------------------------------------------------


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
        (tensors | {"up.lora_C.weight": torch.ones(1)}, "up.lora_C.weight': not the model's"),
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
