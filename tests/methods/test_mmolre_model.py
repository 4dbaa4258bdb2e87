"""MMoLRE's model: missing modalities, fusion, losses, and training resumed from a file."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_moe import safefile
from lora_moe.methods import mmolre
from lora_moe.methods.mmolre import MMoLREConfig, Task

from ..support.compare import relative_error
from ..support.mmolre import CONFIG, DTYPE, LIMIT, WIDTH, batch, model, normal


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


def test_a_missing_modality_has_no_effect_on_its_item():
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
        mask[2] = False  # no modality is left
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


def test_training_resumes_from_a_file_with_the_same_result(tmp_path):
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
        mmolre.load(write(color="red"))
    with pytest.raises(ValueError, match="width: expected an integer"):
        mmolre.load(write(width=10**9))
    with pytest.raises(ValueError, match="activation: expected one of"):
        mmolre.load(write(activation=[]))
    with pytest.raises(ValueError, match="tensors of 192 blocks"):  # raised before any is allocated
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
