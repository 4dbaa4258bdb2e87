"""C-LoRAE's layer against its formula; PyTorch's features."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import pickle
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_moe import functional as F
from lora_moe.methods import c_lorae
from lora_moe.methods.c_lorae import CLoraeConfig, CollaborativeLinear
from lora_moe.methods.c_lorae.information import Pooling

from ..support.c_lorae import CONFIGS, D_OUT, TASKS, fp64, make, samples
from ..support.compare import relative_error
from ..support.interpreter import interpreting
from ..support.through import through

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def adapter(layer):
    return dict(layer.named_parameters(recurse=False))


def by_hand(config, layer, x):
    """The formula, token by token, in fp64 on copies of the parameters: (y, leaves)."""
    p = {n: t.detach().double().requires_grad_() for n, t in adapter(layer).items()}
    x = x.detach().double().requires_grad_()
    starts = [sum(config.ranks[:e]) for e in range(len(config.ranks) + 1)]

    def expert(e, token):
        rows = slice(starts[e], starts[e + 1])
        alpha = config.task_alpha if e and config.task_alpha else config.alpha
        scale = alpha / config.ranks[e]
        return scale * p["lora_B"][rows].T @ (p["lora_A"][rows] @ token)

    y = []
    for sample, task in zip(x, TASKS.tolist(), strict=True):
        for token in sample:
            g = torch.ones(2, dtype=torch.float64)
            if config.gated:
                logits = p["router_weight"] @ token
                g = logits.softmax(0) if config.gate == "softmax" else logits.sigmoid()
            out = layer.weight.double() @ token + layer.bias.double() + g[0] * expert(0, token)
            if config.num_tasks and task >= 0:
                out = out + g[1] * expert(1 + task, token)
            y.append(out)
    return torch.stack(y).view(*x.shape[:2], D_OUT), p | {"x": x}


def forward_and_gradients(config, x):
    """{name: tensor} of the layer and of by_hand."""
    layer = make(config)
    x = x.requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(dy.to(y.dtype))
    truth, leaves = by_hand(config, layer, x)
    truth.backward(dy)
    ours = {"y": y, "x": x.grad} | {name: p.grad for name, p in adapter(layer).items()}
    return ours, {"y": truth} | {name: leaf.grad for name, leaf in leaves.items()}


@fp64
@every_config
def test_equals_the_formula(config):
    ours, truth = forward_and_gradients(config, samples())
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert relative_error(value, truth[name]) < 1e-12, name


@every_config
def test_equals_the_formula_on_interpreted_triton(config):
    pytest.importorskip("triton")
    interpreted = not torch.cuda.is_available()
    with interpreting() if interpreted else contextlib.nullcontext():
        kernels = importlib.import_module("lora_moe.triton_kernels")
    with through(kernels):
        layer = make(config, torch.float32)
        x = samples(torch.float32).requires_grad_()
        y = layer(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        y.backward(dy.float())
    truth, leaves = by_hand(config, layer, x)
    truth.backward(dy)
    assert relative_error(y, truth) < 1e-6
    for name, p in {"x": x, **adapter(layer)}.items():
        assert relative_error(p.grad, leaves[name].grad) < 3e-6, name


def test_both_experts_of_every_task_run_in_one_call():
    layer = make(dtype=torch.float32)
    with mock.patch.object(F, "grouped_lora", wraps=F.grouped_lora) as call:
        layer(samples(torch.float32))
    assert call.call_count == 1
    routing = call.call_args.args[3]
    assert routing.indices.shape == (20, 2)
    assert [sorted(row) for row in routing.indices[::4].tolist()] == [
        [0, 3], [0, 1], [-1, 0], [0, 2], [0, 1],
    ]  # fmt: skip
    assert torch.allclose(routing.weights.sum(1), torch.ones(20))


def test_starts_as_the_base_and_other_tasks_experts_get_no_gradient():
    layer, x = make(dtype=torch.float32), samples(torch.float32)
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer = make(dtype=torch.float32)
    c_lorae.set_tasks(layer, torch.ones(5, dtype=torch.long))
    layer(x).sum().backward()
    rows = layer.lora_B.grad.any(1)
    assert rows[:7].all() and rows[9:11].all() and not rows[7:9].any() and not rows[11:].any()


def test_baselines_have_as_many_parameters():
    config = CLoraeConfig(num_tasks=3, r=24, alpha=24)
    ours = CollaborativeLinear(nn.Linear(576, 1536), config)
    one = CollaborativeLinear(nn.Linear(576, 1536), config.one_lora())
    count = [sum(p.numel() for p in adapter(layer).values()) for layer in (ours, one)]
    assert ours.config.ranks == (24, 8, 8, 8)
    assert count == [48 * (576 + 1536) + 2 * 576, 49 * (576 + 1536)]
    assert count[0] <= count[1] < 1.02 * count[0]
    assert one.scales[0] == ours.scales[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_with_the_same_tasks(reentrant):
    layer = make(dtype=torch.float32)

    def gradients(run):
        layer.zero_grad()
        x = samples(torch.float32).requires_grad_()
        run(x).square().sum().backward()
        return [x.grad, *(p.grad for p in adapter(layer).values())]

    plain = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, again))


def test_compiles_with_fullgraph():
    layer = make(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (3, 5):
        x = samples(torch.float32, length)
        assert relative_error(compiled(x), layer(x)) < 1e-6


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_tasks(duplicate):
    layer = make(dataclasses.replace(CONFIGS["softmax"], mutual_information=True), torch.float32)
    x = samples(torch.float32)
    y = layer(x)
    other = duplicate(layer)
    (pooling,) = Pooling.of(other)
    assert pooling.layer is other and pooling.mean is None
    assert torch.equal(other(x), y) and pooling.mean is not None


def test_dropout_spares_the_gate():
    layer = make(dataclasses.replace(CONFIGS["softmax"], dropout=0.5), torch.float32)
    x = samples(torch.float32)
    first, second = layer(x), layer(x)
    weights = layer.routing.weights
    assert not torch.equal(first, second)
    layer.eval()(x)
    assert torch.equal(layer.routing.weights, weights)


def test_half_precision_base_with_fp32_experts():
    layer = make(dtype=torch.float32)
    truth = layer(samples(torch.float32))
    layer.base_layer.bfloat16()
    y = layer(samples(torch.float32).bfloat16())
    assert y.dtype == torch.bfloat16
    assert relative_error(y, truth) < 0.02
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tasks": -1}, "num_tasks: expected an integer of at least 0, got -1"),
        ({"num_tasks": True}, "num_tasks"),
        ({"num_tasks": 8, "r": 7}, "r: expected at least 8, got 7"),
        ({"num_tasks": 3, "gate": "top"}, "gate: expected one of"),
        ({"num_tasks": 0, "mutual_information": True}, "mutual_information"),
        ({"num_tasks": 3, "alpha": float("nan")}, "alpha"),
        ({"num_tasks": 3, "task_alpha": -1.0}, "alpha"),
        ({"num_tasks": 3, "dropout": 1.0}, "dropout"),
        ({"num_tasks": 5000, "r": 5000}, "num_experts"),
    ],
)
def test_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        CLoraeConfig(**fields)


def test_tasks_are_checked():
    layer, x = make(dtype=torch.float32), samples(torch.float32)
    with pytest.raises(TypeError, match="task_ids: expected integers"):
        c_lorae.set_tasks(layer, torch.zeros(5))
    with pytest.raises(ValueError, match=r"task_ids: expected \(B,\).*, got \(5, 1\)"):
        c_lorae.set_tasks(layer, torch.zeros(5, 1, dtype=torch.int))
    with pytest.raises(ValueError, match=r"c_lorae\.inject"):
        c_lorae.set_tasks(nn.Linear(2, 2), TASKS)
    c_lorae.set_tasks(layer, torch.zeros(3, dtype=torch.int))
    with pytest.raises(ValueError, match=r"task_ids: .* or 5, one per sample, .*, got 3"):
        layer(x)
    with pytest.raises(ValueError, match=r"task ids in \[-1, 3\), got 3"):
        c_lorae.set_tasks(layer, torch.full((5,), 3))
    c_lorae.set_tasks(layer, None)
    with pytest.raises(RuntimeError, match="task_ids: expected"):
        layer(x)
