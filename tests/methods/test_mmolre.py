"""MMoLRE against its formula in literal loops, under every mask, and with PyTorch's features."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_moe import backend, safefile
from lora_moe.methods import mmolre
from lora_moe.methods.mmolre import MMoLRE, MMoLREConfig, Task, UniTSE

from ..support.compare import relative_error
from ..support.interpreter import interpreting
from ..support.through import through

WIDTH, LENGTHS = 10, (5, 3, 0)  # of three items; the last one is all padding
DTYPE = torch.float32 if backend.serving("cpu") == "triton" else torch.float64  # Triton has no fp64
LIMIT = {torch.float64: 1e-12, torch.float32: 2e-6}
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
CONFIG = MMoLREConfig(
    modalities={"text": 6, "audio": WIDTH, "image": 4},
    tasks={
        "sentiment": Task("mae"),
        "emotion": Task("multiclass", 5, 0.5),
        "tags": Task("multilabel", 3),
    },
    width=WIDTH,
    shared_ranks=(2, 3),
    task_rank=2,
)


def block(options, dtype=DTYPE):
    """A block with biases that are not zero and routers that disagree."""
    torch.manual_seed(0)
    made = UniTSE(WIDTH, **({"shared_ranks": (3, 3), "task_ranks": (3, 3)} | options)).to(dtype)
    for bias in (made.bias_A, made.bias_B):
        nn.init.normal_(bias, std=0.5)
    nn.init.normal_(made.router_weight, std=0.5)
    return made


def normal(*shape, seed=1, dtype=DTYPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_of(lengths, longest=None):
    return torch.arange(longest or max(lengths)) < torch.tensor(lengths)[:, None]


def by_loops(layer, x, mask):
    """The formula: tasks, items, positions and experts one by one; x (tasks, B, L, D)."""
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
    """y and the gradients of x and of every parameter for one random gradient of y."""
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
def test_padding_changes_nothing_whatever_lies_there(options):
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


def test_a_tasks_own_expert_learns_from_its_task_alone():
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


def batch(config=CONFIG, dtype=DTYPE, seed=0, items=4):
    g = torch.Generator().manual_seed(seed)
    lengths = {
        name: torch.randint(1, 7, (items,), generator=g).tolist() for name in config.modalities
    }
    masks = {name: mask_of(of, 7) for name, of in lengths.items()}
    features = {
        name: torch.randn(items, 7, size, generator=g, dtype=dtype)
        for name, size in config.modalities.items()
    }
    labels = {
        "sentiment": torch.randn(items, generator=g, dtype=dtype),
        "emotion": torch.randint(5, (items,), generator=g),
        "tags": torch.randint(2, (items, 3), generator=g).to(dtype),
    }
    return features, masks, labels


def model(dtype=DTYPE, **fields):
    torch.manual_seed(0)
    return MMoLRE(dataclasses.replace(CONFIG, **fields)).to(dtype)


def test_model_trains_every_parameter():
    made, (features, masks, labels) = model(), batch()
    outputs = made(features, masks)
    assert {name: tuple(out.shape) for name, out in outputs.items()} == {
        "sentiment": (4, 1), "emotion": (4, 5), "tags": (4, 3),
    }  # fmt: skip
    mmolre.total_loss(made.config, outputs, labels).backward()
    idle = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        loss = mmolre.total_loss(made.config, made(features, masks), labels)
        first = first or loss.item()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first


def test_an_item_does_not_depend_on_padding_or_on_its_batch():
    made, (features, masks, _) = model(), batch()
    want = made(features, masks)
    n = {name: int(mask[1].sum()) for name, mask in masks.items()}
    got = made({name: x[1:2, : n[name]] for name, x in features.items()})
    for task, out in got.items():
        assert relative_error(out[0], want[task][1]) <= LIMIT[DTYPE]


def test_padding_of_nan_reaches_no_gradient():
    made, (features, masks, labels) = model(), batch()
    grads = []
    for filler in (0, torch.nan):
        filled = {n: x.masked_fill(~masks[n][..., None], filler) for n, x in features.items()}
        loss = mmolre.total_loss(made.config, made(filled, masks), labels)
        grads.append(torch.autograd.grad(loss, list(made.parameters())))
    assert all(torch.equal(*pair) for pair in zip(*grads))


def test_a_missing_modality_has_no_part_in_its_item():
    made, (features, masks, _) = model(), batch()
    masks["audio"][2] = False
    out = made(features, masks)
    features["audio"][2] += 100
    again = made(features, masks)
    for task in out:
        assert torch.equal(out[task], again[task])
        assert torch.isfinite(out[task]).all()
    masks = {name: mask.clone() for name, mask in masks.items()}
    for mask in masks.values():
        mask[2] = False  # nothing is there at all
    loss = sum(out.square().sum() for out in made(features, masks).values())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())


def test_fusion_by_hand():
    torch.manual_seed(0)
    fusion = mmolre.Fusion(WIDTH, 2).to(DTYPE)
    nn.init.normal_(fusion.position_query)
    first, second = normal(1, 3, WIDTH), normal(1, 2, WIDTH, seed=2)
    z = []
    for q, h in zip(fusion.position_query, (first[0, :2], second[0])):
        p = torch.softmax(torch.stack([q @ row for row in h]), 0)
        z.append(sum(share * row for share, row in zip(p, h)))
    a = torch.stack(
        [fusion.modality_query.weight[0] @ torch.tanh(fusion.project(row)) for row in z]
    )
    want = sum(share * row for share, row in zip(torch.softmax(a, 0), z))
    got = fusion([first, second], [torch.tensor([[True, True, False]]), None])
    assert relative_error(got[0], want) <= LIMIT[DTYPE]


def test_hard_sharing_has_one_stream_for_all_tasks():
    made = model(hard_sharing=True, task_rank=0)
    features, masks, _ = batch()
    assert made.encoders["text"][1].router_weight.shape == (2, WIDTH)
    seen = []
    for fusion in made.fusion.values():
        fusion.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    made(features, masks)
    assert all(torch.equal(h, other) for h, other in zip(seen[0], seen[1]))


def test_losses_by_hand():
    tasks = {
        "a": Task("mae"),
        "b": Task("mse", 2),
        "c": Task("multiclass", 3, 2.0),
        "d": Task("multilabel", 2),
    }
    config = MMoLREConfig(modalities={"x": 2}, tasks=tasks)
    nan, log = float("nan"), lambda v: float(torch.tensor(v).log())
    outputs = {
        "a": torch.tensor([[1.0], [4.0], [9.0]]),
        "b": torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.0, 0.0]]),
        "c": torch.tensor([[0.0, log(2.0), 0.0], [5.0, 5.0, 5.0], [0.0, 0.0, log(6.0)]]),
        "d": torch.tensor([[0.0, log(3.0)], [log(3.0), 0.0], [7.0, 7.0]]),
    }
    labels = {
        "a": torch.tensor([2.0, nan, 7.0]),
        "b": torch.tensor([[0.0, 2.0], [nan, 2.0], [nan, nan]]),
        "c": torch.tensor([1, -100, 2]),
        "d": torch.tensor([[1.0, 1.0], [0.0, nan], [nan, nan]]),
    }
    found = mmolre.task_losses(config, outputs, labels)
    want = {
        "a": (1 + 2) / 2,
        "b": (1 + 0 + 9) / 3,
        "c": (log(2.0) + log(8 / 6)) / 2,
        "d": (log(2.0) + log(4 / 3) + log(4.0)) / 3,
    }
    for name, value in want.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-6), name
    total = want["a"] + want["b"] + 2 * want["c"] + want["d"]
    assert float(mmolre.total_loss(config, outputs, labels)) == pytest.approx(total, rel=1e-6)
    empty = {name: torch.full_like(v, -100 if name == "c" else nan) for name, v in labels.items()}
    assert float(mmolre.total_loss(config, outputs, empty)) == 0


def test_training_goes_on_from_a_saved_middle_as_if_nothing_had_been(tmp_path):
    def steps(made, optimizer, count, seed):
        for i in range(count):
            features, masks, labels = batch(seed=seed + i)
            optimizer.zero_grad()
            mmolre.total_loss(made.config, made(features, masks), labels).backward()
            optimizer.step()

    straight = model()
    optimizer = torch.optim.Adam(straight.parameters(), 1e-2)
    steps(straight, optimizer, 3, 0)
    mmolre.save(straight, tmp_path / "model.safetensors")
    kept = copy.deepcopy(optimizer.state_dict())
    steps(straight, optimizer, 3, 3)

    resumed = mmolre.load(tmp_path / "model.safetensors").train()
    assert resumed.config == CONFIG
    optimizer = torch.optim.Adam(resumed.parameters(), 1e-2)
    optimizer.load_state_dict(kept)
    steps(resumed, optimizer, 3, 3)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_load_refuses_what_does_not_fit(tmp_path):
    path, made = tmp_path / "model.safetensors", model()
    tensors = {name: t.clone() for name, t in made.state_dict().items()}

    def write(tensors=tensors, **fields):
        metadata = {"mmolre": json.dumps(made.config.to_dict() | fields)}
        safefile.write(path, tensors, metadata)
        return path

    mmolre.load(write())
    with pytest.raises(ValueError, match="the tensors of its configuration"):
        mmolre.load(write(width=WIDTH + 1))
    with pytest.raises(ValueError, match="the tensors of its configuration"):
        mmolre.load(write({**tensors, "more": torch.zeros(1)}))
    with pytest.raises(ValueError, match="only the fields"):
        mmolre.load(write(colour="red"))
    with pytest.raises(ValueError, match="width: expected an integer"):
        mmolre.load(write(width=10**9))
    with pytest.raises(ValueError, match="activation: expected one of"):
        mmolre.load(write(activation=[]))
    with pytest.raises(ValueError, match="tensors of 192 blocks"):  # none of them is made
        mmolre.load(write(blocks=64))
    with pytest.raises(ValueError, match="finite"):
        name = next(iter(tensors))
        mmolre.load(write({**tensors, name: tensors[name] * torch.nan}))
    safefile.write(path, tensors, {"format": "pt"})
    with pytest.raises(ValueError, match="mmolre in its metadata"):
        mmolre.load(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="fill the file"):
        mmolre.load(path)


def test_config_round_trip_through_json():
    config = dataclasses.replace(
        CONFIG, shared_ranks=[4, 5], route="mean", dropout=0.1, residual=True
    )
    assert MMoLREConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modalities": {}}, "modalities: expected 1 to 64 of them, got 0"),
        ({"modalities": ["text"]}, "modalities: expected a dict by name"),
        ({"modalities": {"text": 0}}, r"modalities\['text'\]: expected an integer in \[1, 65536\], got 0"),
        ({"modalities": {"a.b": 3}}, "modalities: expected names that a ModuleDict can hold, got 'a.b'"),
        ({"tasks": {"keys": Task()}}, "tasks: expected names that a ModuleDict can hold, got 'keys'"),
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
def test_config_says_what_is_wrong(fields, message):
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
def test_task_says_what_is_wrong(fields, message):
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


def test_deepcopy_and_checkpointing_change_nothing():
    made, (features, masks, labels) = model(), batch()

    def gradients(made, run):
        loss = mmolre.total_loss(made.config, run(features, masks), labels)
        return torch.autograd.grad(loss, list(made.parameters()))

    want = gradients(made, made)
    other = copy.deepcopy(made)
    recomputed = gradients(made, lambda *args: checkpoint(made, *args, use_reentrant=False))
    for got in (gradients(other, other), recomputed):
        assert all(torch.equal(*pair) for pair in zip(got, want))


def test_block_compiles_in_one_graph():
    layer, mask = block({}), mask_of(LENGTHS)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = normal(*mask.shape, WIDTH)
    want = forward_and_gradients(layer, x, mask, lambda layer, x, mask: layer(x, mask))
    got = forward_and_gradients(layer, x, mask, lambda _, x, mask: compiled(x, mask))
    for name, value in want.items():
        assert relative_error(got[name], value) <= LIMIT[DTYPE], name


def test_gates_are_a_softmax_over_a_tasks_own_choice():
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
