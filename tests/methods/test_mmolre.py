"""MMoLRE's block against its formula in loops, with every mask."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib

import pytest
import torch
from torch import nn

from lora_moe.methods import mmolre
from lora_moe.methods.mmolre import Task, UniTSE

from ..support.compare import relative_error
from ..support.interpreter import interpreting
from ..support.mmolre import CONFIG, DTYPE, LENGTHS, LIMIT, WIDTH, batch, mask_of, model, normal
from ..support.through import through

BLOCKS = {
    "defaults": {},
    "unequal ranks": {"shared_ranks": (1, 7, 3), "task_ranks": (4, 2)},
    "three tasks, one shared expert": {"shared_ranks": (2,), "task_ranks": (3, 3, 3)},
    "no expert of a task's own": {"task_ranks": (0, 0)},
    "one stream": {"task_ranks": (0,)},
    "mean route": {"route": "mean"},
    "residual": {"residual": True},
    "tanh": {"activation": "tanh"},
}
every_block = pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)


def block(options, dtype=DTYPE):
    """A block with nonzero biases and random routers."""
    torch.manual_seed(0)
    made = UniTSE(WIDTH, **({"shared_ranks": (3, 3), "task_ranks": (3, 3)} | options)).to(dtype)
    for bias in (made.bias_A, made.bias_B):
        nn.init.normal_(bias, std=0.5)
    nn.init.normal_(made.router_weight, std=0.5)
    return made


def by_loops(layer, x, mask):
    """The formula in loops over tasks, items, positions and experts; x (tasks, B, L, D)."""
    tasks, B, L, D = x.shape
    experts, start = [], 0  # (A (r, 3 D) of the unfolded input, b1, B, b2)
    for e, r in enumerate(layer.ranks):
        rows = slice(start, start + r)
        a = torch.cat(list(layer.lora_A[:, rows]), 1)
        experts.append((a, layer.bias_A[rows], layer.lora_B[rows], layer.bias_B[e]))
        start += r
    phi = {"relu": torch.relu, "tanh": torch.tanh}[layer.activation]
    routers = layer.router_weight.unflatten(0, (tasks, layer.choices))
    rows = []
    for t in range(tasks):
        for b in range(B):
            there = [i for i in range(L) if mask[b, i]]
            zero = x.new_zeros(D)
            at = {i: x[t, b, i] for i in there}
            logits = {i: routers[t] @ at[i] for i in there}
            for i in range(L):
                if i not in at:
                    rows.append(zero)
                    continue
                logit = logits[i]
                if layer.route == "mean":
                    logit = sum(logits.values()) / len(there)
                gates = torch.softmax(logit, 0)
                unfolded = torch.cat([at.get(i - 1, zero), at[i], at.get(i + 1, zero)])
                chosen = experts[: layer.shared]
                if layer.choices > layer.shared:
                    chosen = [*chosen, experts[layer.shared + t]]
                y = at[i] if layer.residual else zero
                for g, (a, b1, w2, b2) in zip(gates, chosen, strict=True):
                    y = y + g * (phi(a @ unfolded + b1) @ w2 + b2)
                rows.append(y)
    return torch.stack(rows).view(tasks, B, L, D)


def loops_over_one_input(layer, x, mask):
    return by_loops(layer, x.expand(layer.tasks, *x.shape), mask)


def forward_and_gradients(layer, x, mask, run):
    """y, and the gradients of x and all parameters for one random gradient of y."""
    x = x.detach().requires_grad_()
    y = run(layer, x, mask)
    leaves = [x, *layer.parameters()]
    dy = normal(*y.shape, seed=3, dtype=torch.float32).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, dy)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    return {"y": y} | dict(zip(names, grads, strict=True))


@every_block
@pytest.mark.parametrize("inputs", ["one input", "an input a task"])
def test_block_equals_the_formula(options, inputs):
    layer, mask = block(options), mask_of(LENGTHS)
    one = inputs == "one input"
    x = normal(*([] if one else [layer.tasks]), *mask.shape, WIDTH)
    loops = loops_over_one_input if one else by_loops
    got = forward_and_gradients(layer, x, mask, lambda layer, x, mask: layer(x, mask))
    want = forward_and_gradients(layer, x, mask, loops)
    for name, value in want.items():
        assert value.any(), name
        assert relative_error(got[name], value) <= LIMIT[DTYPE], name


@every_block
def test_block_runs_on_the_triton_kernels(options):
    pytest.importorskip("triton")
    with contextlib.nullcontext() if torch.cuda.is_available() else interpreting():
        kernels = importlib.import_module("lora_moe.triton_kernels")
    layer, mask = block(options, torch.float32), mask_of(LENGTHS)
    x = normal(*mask.shape, WIDTH, dtype=torch.float32)
    with through(kernels):
        got = forward_and_gradients(layer, x, mask, lambda layer, x, mask: layer(x, mask))
    want = forward_and_gradients(layer.double(), x.double(), mask, loops_over_one_input)
    for name, value in want.items():
        assert relative_error(got[name], value) <= LIMIT[torch.float32], name


@every_block
def test_padding_changes_nothing_whatever_its_values(options):
    layer = block(options)
    short = normal(2, 4, WIDTH)
    want = layer(short)
    long = torch.cat([short, torch.full((2, 6, WIDTH), torch.nan, dtype=DTYPE)], 1)
    got = layer(long, mask_of((4, 4), 10))
    assert torch.equal(got[:, :, 4:], torch.zeros_like(got[:, :, 4:]))
    assert relative_error(got[:, :, :4], want) <= LIMIT[DTYPE]


def test_no_position_and_one_position():
    layer = block({})
    assert layer(normal(2, 0, WIDTH)).shape == (2, 2, 0, WIDTH)
    x = normal(2, 1, WIDTH)
    want = by_loops(layer, x.expand(2, *x.shape), mask_of((1, 1)))
    assert relative_error(layer(x), want) <= LIMIT[DTYPE]


def test_a_task_expert_learns_from_its_task_only():
    layer = block({})
    y = layer(normal(2, 5, WIDTH))
    y[0].square().sum().backward()
    shared, own, others = layer.lora_B.grad.split([6, 3, 3])
    assert shared.any() and own.any() and not others.any()


@pytest.mark.skipif(torch.float64 != DTYPE, reason="needs fp64")
def test_gradcheck():
    layer, mask = block({"activation": "tanh"}), mask_of((3, 1))
    x = normal(2, 2, 3, WIDTH).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, mask), (x, *layer.parameters()))


def test_bf16_input_with_fp32_parameters():
    layer = block({}, torch.float32)
    x = normal(2, 5, WIDTH, dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, layer(x.float())) < 2**-7
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modalities": {}}, "modalities: expected 1 to 64 entries, got 0"),
        ({"modalities": ["text"]}, "modalities: expected a dict with names as keys"),
        ({"modalities": {"text": 0}}, r"modalities\['text'\]: expected an integer in \[1, 65536\], got 0"),
        ({"modalities": {"a.b": 3}}, "modalities: expected names that are valid in a ModuleDict, got 'a.b'"),
        ({"tasks": {"keys": Task()}}, "tasks: expected names that are valid in a ModuleDict, got 'keys'"),
        ({"tasks": {"a": "mae"}}, r"tasks\['a'\]: expected a Task, got 'mae'"),
        ({"width": True}, "width: expected an integer"),
        ({"shared_ranks": ()}, r"shared_ranks: expected 1 to 64 ranks, got \(\)"),
        ({"shared_ranks": 8}, "shared_ranks: expected 1 to 64 ranks, got 8"),
        ({"shared_ranks": (8, 2000)}, r"shared_ranks\[1\]: expected an integer in \[1, 1024\], got 2000"),
        ({"task_rank": -1}, "task_rank: expected an integer"),
        ({"blocks": 0}, "blocks: expected an integer"),
        ({"activation": "swish"}, "activation: expected one of"),
        ({"route": "first"}, "route: expected one of"),
        ({"residual": 1}, "residual: expected a bool, got 1"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
        ({"dropout": float("nan")}, "dropout: expected a number"),
        ({"hard_sharing": True}, "task_rank: expected 0 with hard_sharing"),
    ],
)  # fmt: skip
def test_config_names_the_invalid_field(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "huber"}, "loss: expected one of"),
        ({"outputs": 0}, "outputs: expected an integer"),
        ({"weight": -1.0}, r"weight: expected a number in \[0, 1e\+06\], got -1.0"),
        ({"weight": float("inf")}, "weight: expected a number"),
    ],
)
def test_task_names_the_invalid_field(fields, message):
    with pytest.raises(ValueError, match=message):
        Task(**fields)


def test_inputs_that_do_not_fit_raise():
    made, (features, masks, labels) = model(), batch()
    without = {name: x for name, x in features.items() if name != "audio"}
    with pytest.raises(
        ValueError, match=r"features: expected the modalities \['audio', 'image', 'text'\]"
    ):
        made(without)
    with pytest.raises(ValueError, match="masks"):
        made(features, masks | {"smell": masks["text"]})
    with pytest.raises(
        ValueError, match=r"features\['text'\]: expected \(4, L, 6\), got \(4, 7, 5\)"
    ):
        made(features | {"text": features["text"][..., :5]}, masks)
    with pytest.raises(
        ValueError, match=r"features\['audio'\]: expected \(4, L, 10\), got \(3, 7, 10\)"
    ):
        made(features | {"audio": features["audio"][:3]}, masks)
    with pytest.raises(
        ValueError, match=r"masks\['text'\]: expected bool \(4, 7\), got torch.float32"
    ):
        made(features, masks | {"text": masks["text"].float()})
    with pytest.raises(ValueError, match=r"labels\['tags'\]: expected \(4, 3\), got \(4,\)"):
        mmolre.total_loss(
            made.config, made(features, masks), labels | {"tags": labels["sentiment"]}
        )
    layer = block({})
    with pytest.raises(
        ValueError, match=r"x: expected \(B, L, 10\) or \(2, B, L, 10\), got \(3, 1, 2, 10\)"
    ):
        layer(normal(3, 1, 2, WIDTH))
    with pytest.raises(ValueError, match=r"mask: expected bool \(1, 2\), got torch.bool \(1, 3\)"):
        layer(normal(1, 2, WIDTH), mask_of((3,)))
    for ranks in ((3, 0), ()):
        with pytest.raises(ValueError, match="task_ranks: expected one per task, all or none 0"):
            UniTSE(WIDTH, (2,), ranks)
    with pytest.raises(ValueError, match="activation: expected one of"):
        UniTSE(WIDTH, (2,), (3,), activation=["relu"])
    with pytest.raises(ValueError, match="route: expected one of"):
        UniTSE(WIDTH, (2,), (3,), route="first")


def test_block_compiles_in_one_graph():
    layer, mask = block({}), mask_of(LENGTHS)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = normal(*mask.shape, WIDTH)
    want = forward_and_gradients(layer, x, mask, lambda layer, x, mask: layer(x, mask))
    got = forward_and_gradients(layer, x, mask, lambda _, x, mask: compiled(x, mask))
    for name, value in want.items():
        assert relative_error(got[name], value) <= LIMIT[DTYPE], name


def test_gates_are_a_softmax_over_the_experts_of_a_task():
    layer = block({})
    layer(normal(2, 5, WIDTH))
    assert layer.gates.shape == (2, 2, 5, 4)
    torch.testing.assert_close(layer.gates.sum(-1), torch.ones_like(layer.gates[..., 0]))
    assert not layer.gates[0, ..., 3].any() and not layer.gates[1, ..., 2].any()


def test_a_new_block_keeps_the_variance_of_its_input():
    torch.manual_seed(0)
    layer = UniTSE(256, (32, 64, 32), (48, 16))
    y = layer(torch.randn(8, 40, 256))
    assert 0.7 < y[:, :, 1:-1].square().mean().item() < 1.4


def test_optimizer_step_changes_the_next_forward():
    layer, x = block({}), normal(2, 5, WIDTH)
    before = layer(x)
    before.square().mean().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert relative_error(layer(x), before) > 1e-3
