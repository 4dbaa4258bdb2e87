"""BranchLoRA's layer against its formula; PyTorch's features; refused inputs."""

from __future__ import annotations

import contextlib
import copy
import importlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_moe
from lora_moe import LoraMoeConfig
from lora_moe.methods import branch_lora as bl

from ..support.branch_lora import (
    D_IN,
    D_OUT,
    MASK,
    B,
    E,
    Host,
    K,
    L,
    R,
    every_reading,
    host,
    tokens,
)
from ..support.compare import relative_error
from ..support.interpreter import interpreting
from ..support.through import through


def formula(layer, x, mask, route_by, tasks):
    """y_i = W0 x_i + b + s * sum over j in topk(W_t x_*) of  g_j B_j A x_i, token by token, and usage."""
    base, rows = layer.base_layer, []
    usage = torch.zeros(len(bl.branches_of(layer)), dtype=x.dtype)
    for b in range(x.shape[0]):
        real = [i for i in range(x.shape[1]) if mask[b, i]]
        for i in range(x.shape[1]):
            by = {"first": x[b, real[0]], "mean": sum(x[b, j] for j in real) / len(real)}
            router = bl.routers_of(layer)[tasks[b]]
            p = torch.softmax(router @ by.get(route_by, x[b, i]), 0)
            picked = sorted(range(len(p)), key=lambda e: (-p[e].item(), e))[:K]
            y = base.weight @ x[b, i] + base.bias
            for e in picked:
                gate = p[e] / sum(p[j] for j in picked)
                y = y + layer.scales[0] * gate * bl.branches_of(layer)[e].T @ (
                    layer.lora_A @ x[b, i]
                )
                if mask[b, i] if route_by == "token" else i == 0:
                    usage[e] += gate.item()
            rows.append(y)
    return torch.stack(rows).view(x.shape[0], x.shape[1], -1), usage


def leaves(model, x):
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {"x": x} | trained


def gradients(y, dy, model, x):
    named = leaves(model, x)
    found = torch.autograd.grad(y, list(named.values()), dy, allow_unused=True)
    return dict(zip(named, found))


@every_reading
@pytest.mark.parametrize("masked", [True, False], ids=["padded", "full"])
def test_the_layer_equals_its_formula(route_by, masked):
    model, x = host(route_by), tokens().requires_grad_()
    mask = MASK if masked else torch.ones_like(MASK)
    y = model(x, attention_mask=mask if masked else None)
    want, usage = formula(model.linear, x, mask, route_by, [0] * B)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    got, expected = gradients(y, dy, model, x), gradients(want, dy, model, x)
    assert relative_error(y, want) < 1e-12
    assert {"x", "linear.lora_A", "linear.router_weight_0", "linear.lora_B"} <= set(got)
    for name, grad in got.items():
        truth = expected[name]
        if truth is None:
            assert not grad.any(), name
        else:
            assert relative_error(grad, truth) < 1e-12, name
    assert torch.allclose(model.linear.usage.double(), usage, rtol=1e-6)
    assert model.linear.scales[0] == 0.5


@every_reading
def test_on_the_triton_kernels(route_by):
    pytest.importorskip("triton")
    with interpreting() if not torch.cuda.is_available() else contextlib.nullcontext():
        kernels = importlib.import_module("lora_moe.triton_kernels")
    model, x = host(route_by, dtype=torch.float32), tokens(torch.float32).requires_grad_()
    truth, x_truth = copy.deepcopy(model).double(), x.detach().double().requires_grad_()
    want, _ = formula(truth.linear, x_truth, MASK, route_by, [0] * B)
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    with through(kernels):
        y = model(x, attention_mask=MASK)
        got = gradients(y, dy, model, x)
    assert relative_error(y, want) < 12 * 2**-24
    for name, truth_grad in gradients(want, dy.double(), truth, x_truth).items():
        if truth_grad is None:
            assert not got[name].any()
        else:
            assert relative_error(got[name], truth_grad) < 40 * 2**-24, name


@every_reading
def test_each_sequence_may_have_its_own_task(route_by):
    model, x, tasks = host(route_by, tasks=3).eval(), tokens(), [2, 0, 1, 2]
    bl.set_task(model, tasks)
    mixed = model(x, attention_mask=MASK)
    assert relative_error(mixed, formula(model.linear, x, MASK, route_by, tasks)[0]) < 1e-12
    for b, task in enumerate(tasks):
        bl.set_task(model, task)
        assert torch.equal(model(x, attention_mask=MASK)[b], mixed[b])


def test_starts_as_the_base_bit_for_bit_and_requires_a_task():
    model = Host(torch.float32)
    want = model.linear(tokens(torch.float32))
    bl.inject(model, bl.branch_lora(E, R, target_modules=("linear",)))
    with pytest.raises(RuntimeError, match="task_ids: expected"):
        model(tokens(torch.float32))
    bl.begin_task(model)
    assert torch.equal(model(tokens(torch.float32)), want)


@every_reading
def test_gradient_checkpointing_counts_once_and_changes_nothing(route_by):
    plain, again = host(route_by, dropout=0.3), host(route_by, dropout=0.3)
    dy = torch.ones(B, L, D_OUT, dtype=torch.float64)
    for use_reentrant in (True, False):
        for layer in (plain.linear, again.linear):
            layer.usage.zero_()
        for model, call in ((plain, lambda f, *a, **_: f(*a)), (again, checkpoint)):
            torch.manual_seed(3)
            model.zero_grad()
            x = tokens().requires_grad_()
            call(model, x, MASK, use_reentrant=use_reentrant).backward(dy)
        for (name, p), (_, q) in zip(plain.named_parameters(), again.named_parameters()):
            assert p.grad is q.grad is None or torch.equal(p.grad, q.grad), name
        assert plain.linear.usage.any() and torch.equal(plain.linear.usage, again.linear.usage)


@every_reading
def test_compiles(route_by):
    model, x = host(route_by).eval(), tokens()
    bl.set_mask(model, MASK)
    layer = model.linear
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), layer(x)) < 1e-15


def test_copies_are_independent():
    model = host(tasks=2)
    model(tokens(), attention_mask=MASK)
    copied = copy.deepcopy(model)
    assert bl.state_of(copied)[1] is not bl.state_of(model)[1]
    bl.set_task(copied, 0)
    other = copied(tokens(), attention_mask=MASK)
    assert bl.state_of(model)[1].task == 1 and not torch.equal(other, model(tokens(), MASK))


def test_masks_that_do_not_fit_are_refused():
    model, x = host(), tokens()
    with pytest.raises(ValueError, match=r"attention_mask: expected \(4, 6\) as x, got \(4, 5\)"):
        model(x, attention_mask=MASK[:, :5])
    with pytest.raises(ValueError, match=r"attention_mask: expected \(B, L\), got \(4, 1, 6, 6\)"):
        model(x, attention_mask=MASK[:, None, None].expand(B, 1, L, L))
    with pytest.raises(ValueError, match=r"x: expected \(B, L, D_in\)"):
        model(x[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: bl.begin_task(m), "expected end_task for task 0 first"),
        (lambda m: (bl.end_task(m), bl.end_task(m)), "expected begin_task first"),
        (lambda m: bl.end_task(m, -1), "freeze: expected a number of branches, got -1"),
        (lambda m: bl.add_branches(m, 0), "n: expected a positive number of branches, got 0"),
        (lambda m: bl.add_branches(m, 5000), "num_experts: expected"),
        (lambda m: bl.set_task(m, 1), r"task: expected numbers in \[0, 1\), got 1"),
        (lambda m: bl.set_task(m, [0, -1]), r"expected numbers in \[0, 1\), got \[0, -1\]"),
        (lambda m: bl.set_task(m, 0.5), r"expected a number or \(B,\) numbers"),
        (lambda m: bl.set_mask(m, MASK[0]), r"mask: expected \(B, L\), got \(6,\)"),
        (lambda m: bl.inject(m, bl.branch_lora(target_modules=("linear",))), "without branches"),
        (lambda m: bl.begin_task(nn.Linear(2, 2)), "expected one with branches"),
        (
            lambda m: bl.inject(Host(None), bl.branch_lora(), route_by="last"),
            "route_by: expected one of",
        ),
        (
            lambda m: bl.inject(Host(None), LoraMoeConfig(target_modules=("linear",))),
            "config: expected shared_a=True",
        ),
        (lambda m: bl.moelora(8, 12), "r: expected a multiple of 8 experts, got 12"),
        (
            lambda m: (bl.set_task(m, [0, 0]), m(tokens())),
            "task_ids: expected 4, one per sample of the batch .*, got 2",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(host())


def test_moelora_equals_its_formula():
    """y = W0 x + (alpha / r) sum_e softmax(W x)_e B_e A_e x, each expert of rank r / E."""
    torch.manual_seed(0)
    layer = lora_moe.LoraMoeLinear(nn.Linear(D_IN, D_OUT).double(), bl.moelora(4, 12, 30.0))
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.router_weight, std=0.5)
    x = tokens()[0].requires_grad_()
    gates = torch.softmax(x @ layer.router_weight.T, 1)
    want = nn.functional.linear(x, layer.weight, layer.bias)
    for e in range(4):
        rows = slice(3 * e, 3 * e + 3)
        want = want + 2.5 * gates[:, e, None] * (x @ layer.lora_A[rows].T @ layer.lora_B[rows])
    y, dy = layer(x), torch.randn(want.shape).double()
    assert relative_error(y, want) < 1e-12
    named = [x, layer.lora_A, layer.lora_B, layer.router_weight]
    for got, truth in zip(torch.autograd.grad(y, named, dy), torch.autograd.grad(want, named, dy)):
        assert relative_error(got, truth) < 1e-12
