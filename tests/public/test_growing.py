"""grow: old rows keep their bits, optimizers are updated, and routers follow the `router` option."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_moe import (
    aux_loss,
    freeze_experts,
    grow,
    injected,
    load_adapter,
    merge,
    save_adapter,
    set_routing,
    to_peft,
    use_routing,
)

from ..support.growing import BANKS, D, E, Model, X, by_expert, close, run, state, with_experts


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


def test_routings_set_before_growing_and_copies():
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


def test_experts_from_peft_are_exported_unchanged(tmp_path):
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
def test_an_optimizer_continues(kind, router, bank):
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


def test_an_optimizer_not_passed_to_grow_raises():
    model = with_experts()
    stale = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    train(model, stale, 1)
    grow(model, 1)
    model(X).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"pass the optimizer to grow\(model, n, optimizer=\)"):
        stale.step()
    other.step()
    new = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, new, 1)


def test_frozen_and_shared_parameters_are_kept():
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
