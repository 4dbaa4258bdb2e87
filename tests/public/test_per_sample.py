"""Experts mixed once per sample or gated per token: both against loops in fp64, and which one runs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_moe import (
    LoraMoeConfig,
    LoraMoeLinear,
    Routing,
    backend_info,
    freeze_experts,
    plan,
    presets,
    set_routing,
    use_routing,
)
from lora_moe.middles import MixedMiddle
from lora_moe.routers import PolyRouter, Router, SequenceRouter, TaskRouter

B, L, D_IN, D_OUT, E, R, N = 3, 5, 10, 6, 4, 2, 3
TASKS = torch.tensor([2, -1, 0])


def config(**fields):
    return LoraMoeConfig(num_experts=E, r=R, **fields)


SHARED = {"shared_a": True, "top_k": E}
UNEQUAL = {"alpha": (1, 2, 3, 4)}
MIXED = {"top_k": 2, "middle": MixedMiddle()}
CONFIGS = {
    "poly": presets.poly(N, E, R, 3.0),
    "poly, unequal scales": config(router=PolyRouter(N), **MIXED, **UNEQUAL),
    "poly by sequence": config(router=SequenceRouter("mean"), **MIXED),
    "mtl_lora": presets.mtl_lora(N, E, R, 3.0, temperature=0.5),
    "sequence": config(router=SequenceRouter("mean"), **SHARED),
    "task": config(router=TaskRouter(N), **SHARED),
    "weights": config(router=TaskRouter(N, "weights"), **SHARED),
    "given": config(**SHARED, **UNEQUAL),
}
TRITON = backend_info()["serving"]["cpu"] == "triton"  # Triton has no fp64
DTYPE = torch.float32 if TRITON else torch.float64
NEAR = {"rtol": 1e-4, "atol": 2e-5} if TRITON else {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(params=[False, True], ids=["per token", "per sample"])
def mixes(request, monkeypatch):
    monkeypatch.setattr(plan, "mixes", lambda *shape: request.param)
    return request.param


@pytest.fixture
def ways(monkeypatch):
    """Replaces plan.mixes by a recorder that always allows mixing."""
    calls = []
    monkeypatch.setattr(plan, "mixes", lambda *shape: not calls.append(shape))
    return calls


def made(name, dtype=DTYPE, **fields):
    torch.manual_seed(0)
    chosen = LoraMoeConfig.from_dict(CONFIGS[name].to_dict() | fields)
    layer = LoraMoeLinear(nn.Linear(D_IN, D_OUT, dtype=dtype), chosen).eval()
    for parameter in layer.parameters(recurse=False):
        nn.init.normal_(parameter)
    x = torch.randn(B, L, D_IN, dtype=dtype, requires_grad=True)
    return layer, x


def gates_given():
    return torch.randn(B, E, generator=torch.Generator().manual_seed(3)).to(DTYPE)


def told(layer, name, gates=None):
    if name == "given":
        return use_routing(
            layer, routing=Routing.from_gates(gates_given() if gates is None else gates)
        )
    return use_routing(
        layer, task_ids=TASKS if layer.config.num_tasks else None, mask=torch.ones(B, L)
    )


def gates_of(name, layer, x, p):
    """(B, E), from the papers' formulas."""
    k = layer.config.top_k
    if name == "given":
        return gates_given()
    rows = []
    for b, t in enumerate(TASKS.tolist()):
        if "sequence" in name:
            g = torch.softmax(p["router_weight"] @ x[b].mean(0), 0)
        elif name.startswith("poly"):
            g = torch.sigmoid(p["router_table"][t])
        elif name == "weights":
            g = p["router_table"][t]
        else:
            g = torch.softmax(p["router_table"][t] / layer.config.temperature, 0)
        if name != "weights":
            picked = torch.zeros_like(g).scatter(0, g.topk(k).indices, 1)
            g = g * picked / (g * picked).sum()
        rows.append(g * (t >= 0 or "sequence" in name))
    return torch.stack(rows)


def formula(name, layer, x, p):
    """Loops over samples, tokens and experts."""
    s, gates, out = layer.config.scales, gates_of(name, layer, x, p), []
    A = p["lora_A"].split(R) * (E if layer.config.shared_a else 1)
    B_e = p["lora_B"].split(R)
    for b in range(B):
        for i in range(L):
            v = x[b, i]
            if layer.config.middle is not None and layer.config.middle.kind == "mixed":
                a = sum(gates[b, e] * A[e] for e in range(E))
                y = (a @ v) @ sum(gates[b, e] * s[e] * B_e[e] for e in range(E))
            else:
                core = torch.eye(R, dtype=x.dtype)
                if "middle_core" in p:
                    core = p["middle_core"][TASKS[b]]
                y = sum(gates[b, e] * s[e] * ((core @ (A[e] @ v)) @ B_e[e]) for e in range(E))
            out.append(y)
    return torch.stack(out).view(B, L, -1)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_loops_forward_and_all_gradients(name, mixes):
    layer, x = made(name)
    p = {k: t.detach().clone().requires_grad_() for k, t in layer.adapter_state().items()}
    wide = x.detach().clone().requires_grad_()
    want = layer.base_layer(wide) + formula(name, layer, wide, p)
    with told(layer, name):
        got = layer(x)
    torch.testing.assert_close(got, want, **NEAR)
    dy = torch.randn_like(want)
    got.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(x.grad, wide.grad, **NEAR)
    for key, tensor in layer.adapter_state().items():
        truth = torch.zeros_like(tensor) if p[key].grad is None else p[key].grad
        torch.testing.assert_close(tensor.grad, truth, **NEAR, msg=lambda m, k=key: f"{k}: {m}")


def test_a_callers_gates_get_their_gradient(mixes):
    layer, x = made("given")
    gates, truth = (gates_given().requires_grad_() for _ in range(2))
    with told(layer, "given", gates):
        layer(x).square().sum().backward()
    per_token = Routing.from_gates(truth.repeat_interleave(L, 0))
    with use_routing(layer, routing=per_token):
        layer(x).square().sum().backward()
    torch.testing.assert_close(gates.grad, truth.grad, **NEAR)


def test_a_sample_without_experts_is_the_base_bit_for_bit(mixes):
    for name in ("poly", "mtl_lora", "task", "weights"):
        layer, x = made(name, dtype=torch.float32)
        with torch.no_grad(), told(layer, name):
            assert torch.equal(layer(x)[1], layer.base_layer(x)[1]), name


@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_experts_take_no_gradient(name, mixes):
    layer, x = made(name)
    freeze_experts(layer, [1, 2])
    with told(layer, name):
        layer(x).square().sum().backward()
    assert not layer.lora_B.grad[R : 3 * R].any() and layer.lora_B.grad.any()
    assert layer.config.shared_a or not layer.lora_A.grad[R : 3 * R].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_in_bfloat16_both_ways_are_near_the_formula(name, mixes):
    layer, x = made(name, dtype=torch.bfloat16)
    assert layer.lora_A.dtype == torch.float32
    wide = copy.deepcopy(layer).to(DTYPE)
    with torch.no_grad(), told(layer, name):
        got = layer(x)
    with torch.no_grad(), told(wide, name):
        want = wide(x.to(DTYPE))
    assert got.dtype == torch.bfloat16
    assert (got.to(DTYPE) - want).abs().max() <= 0.03 * want.abs().max()


def test_under_autocast(mixes):
    layer, x = made("poly", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), told(layer, "poly"):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.router_table.grad.any()
    with torch.no_grad(), told(layer, "poly"):
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05 * y.abs().max().item())


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_an_activation_checkpoint(mixes, reentrant):
    """In training mode, with the noise of the forward."""
    layer, x = made("poly")
    layer.train()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        with told(layer, "poly"):
            run(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters(recurse=False))])
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_what_is_saved_does_not_depend_on_the_routing(mixes):
    shapes = []
    for tasks in ([0, 0, 0], [0, 1, 2], [-1, -1, 2]):
        layer, x = made("poly")
        saved = []
        pack = lambda t, saved=saved: saved.append((t.shape, t.dtype)) or t  # noqa: E731
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with hooks, use_routing(layer, task_ids=torch.tensor(tasks)):
            layer(x)
        shapes.append(saved)
    assert shapes[0] == shapes[1] == shapes[2] != []


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (1, 1), (1, 7), (4, 1)])
@pytest.mark.parametrize("name", ["poly", "mtl_lora", "sequence"])
def test_few_or_no_samples_and_tokens(name, shape):
    layer, _ = made(name)
    x = torch.randn(*shape, D_IN, dtype=DTYPE, requires_grad=True)
    tasks = torch.arange(shape[0]) % N if layer.config.num_tasks else None
    if shape[1] == 0 and name == "sequence":
        pytest.skip("a sequence without tokens decides nothing")
    with use_routing(layer, task_ids=tasks, mask=torch.ones(shape)):
        y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape, D_OUT) and y.isfinite().all()


def test_tasks_of_tokens_one_task_for_all_and_flat_tokens(ways):
    """Inputs without one row per sample are gated per token, with the same result."""
    layer, x = made("poly")
    with torch.no_grad(), told(layer, "poly"):
        want = layer(x)
    assert [shape[1:3] for shape in ways] == [(B * L, B)]
    assert (
        layer.routing.indices.shape == (B * L, E) and layer.routing.counts.tolist() == [2 * L] * E
    )
    with torch.no_grad(), use_routing(layer, task_ids=TASKS.repeat_interleave(L)):
        torch.testing.assert_close(layer(x), want, **NEAR)
        torch.testing.assert_close(layer(x.flatten(0, 1)), want.flatten(0, 1), **NEAR)
    assert len(ways) == 1
    with torch.no_grad(), use_routing(layer, task_ids=torch.tensor(2)):
        torch.testing.assert_close(layer(x)[0], want[0], **NEAR)
        torch.testing.assert_close(layer(x[0]), want[0], **NEAR)
    assert len(ways) == 2
    set_routing(layer, task_ids=TASKS)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want, **NEAR)
    assert len(ways) == 3
    with pytest.raises(ValueError, match="task_ids: expected 12 rows"):
        layer(x[:2].repeat(2, 1, 1)[:, :3])


@pytest.mark.parametrize("fields", [{"top_k": 2}, {"top_p": 0.5}, {"threshold": 0.2}])
def test_experts_that_no_token_picked_are_not_mixed(ways, fields):
    """They may hold NaN."""
    layer, x = made("sequence", **fields)
    with torch.no_grad():
        layer(x)
    assert not ways


def test_a_subclass_with_its_own_route_decides_per_token(ways):
    class Last(TaskRouter):
        kind = "last, of a test"

        def route(self, x, tensors, batch):
            return Routing.from_ids(torch.full((B * L,), E - 1), num_experts=E)

    assert Last.per_sample is Router.per_sample and TaskRouter.per_sample is not Router.per_sample
