"""C-LoRAE's mutual information loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from lora_moe.methods import c_lorae
from lora_moe.methods.c_lorae import CollaborativeLinear

from ..support.c_lorae import CONFIGS, D_IN, D_OUT, TASKS, fp64, make, samples
from ..support.compare import relative_error


@fp64
@pytest.mark.parametrize("negatives", ["batch", "task"])
def test_mutual_information_loss_equals_the_formula(negatives):
    layer = make(dataclasses.replace(CONFIGS["softmax"], mutual_information=True))
    x = samples().requires_grad_()
    layer(x)
    loss = c_lorae.mutual_information_loss(layer, temperature=0.2, negatives=negatives)
    a, b, ranks = layer.lora_A, layer.lora_B, layer.config.ranks
    rows = torch.arange(sum(ranks)).split(list(ranks))

    def mean_output(e, sample):
        token_outputs = (5 / ranks[e]) * (sample @ a[rows[e]].T) @ b[rows[e]]  # (L, D_out)
        mean = token_outputs.mean(0)
        return mean / (mean.square().sum() + 1e-4).sqrt()

    kept = [i for i, task in enumerate(TASKS.tolist()) if task >= 0]
    u = [mean_output(0, x[i]) for i in kept]
    d = [mean_output(1 + int(TASKS[i]), x[i]) for i in kept]
    task, want, pairs = TASKS[kept].tolist(), 0, 0
    for i in range(len(kept)):
        others = [j for j in range(len(kept)) if negatives == "batch" or task[j] == task[i]]
        scores = torch.stack([u[i] @ d[j] for j in others]) / 0.2
        own = scores[others.index(i)]
        want, pairs = (
            want - torch.log(own.exp() / scores.exp().sum()) / len(kept),
            pairs + len(others),
        )
    assert len(kept) < pairs and (pairs < len(kept) ** 2) == (negatives == "task")
    assert relative_error(loss, want) < 1e-12
    leaves = (x, a, b)
    ours, truth = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (loss, want))
    for one, other in zip(ours, truth, strict=True):
        assert relative_error(one, other) < 1e-11


def test_mutual_information_rises_in_training_and_starts_with_a_finite_gradient():
    config = dataclasses.replace(CONFIGS["softmax"], mutual_information=True)
    torch.manual_seed(0)
    layer, x = CollaborativeLinear(nn.Linear(D_IN, D_OUT), config), samples(torch.float32)
    c_lorae.set_tasks(layer, TASKS)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    trace = []
    for _ in range(40):
        layer(x)
        loss = c_lorae.mutual_information_loss(layer)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in (layer.lora_A, layer.lora_B))
        nn.init.normal_(layer.lora_B, std=0.1) if len(trace) == 0 else optimizer.step()
        trace.append(loss.item())
    assert trace[0] == pytest.approx(
        torch.tensor(4.0).log().item(), abs=1e-5
    )  # four samples, B = 0
    assert trace[-1] < 0.5 * trace[1]


def test_mutual_information_needs_its_option_and_a_forward():
    with pytest.raises(ValueError, match="mutual_information=True"):
        c_lorae.mutual_information_loss(make(dtype=torch.float32))
    layer = make(dataclasses.replace(CONFIGS["softmax"], mutual_information=True))
    with pytest.raises(RuntimeError, match="forward"):
        c_lorae.mutual_information_loss(layer)
    layer(samples())
    with pytest.raises(ValueError, match="negatives: expected one of"):
        c_lorae.mutual_information_loss(layer, negatives="tasks")
