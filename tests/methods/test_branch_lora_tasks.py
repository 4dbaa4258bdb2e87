"""BranchLoRA over a sequence of tasks: frozen branches, new branches, keys, metrics."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_moe
from lora_moe.methods import branch_lora as bl
from lora_moe.methods.branch_lora.continual import TaskSelector, continual_metrics

from ..support.branch_lora import (
    D_IN,
    D_OUT,
    MASK,
    B,
    E,
    K,
    L,
    R,
    every_reading,
    host,
    learn,
    step,
    tokens,
)

BACKEND = lora_moe.backend_info()["serving"]["cpu"]


def test_frozen_branches_keep_their_bits():
    model = host()
    optimizer = learn(model)
    used = model.linear.usage.clone()
    bl.end_task(model)
    layer = model.linear
    assert layer.frozen == tuple(sorted(used.topk(K).indices.tolist())) and not layer.usage.any()
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    branches = [rows.detach().clone() for rows in bl.branches_of(layer)]
    bl.begin_task(model)
    for i in range(3):  # also with the old optimizer, which has momentum for them
        step(model, optimizer, i)
    learn(model, seed=1)
    for e in range(E):
        same = torch.equal(bl.branches_of(layer)[e], branches[e])
        assert same == (e in layer.frozen), e
    assert torch.equal(bl.routers_of(layer)[0], before["router_weight_0"])
    assert not torch.equal(layer.lora_A, before["lora_A"])


def test_usage_counts_only_training_of_the_current_task():
    model, usage = host(tasks=2), lambda: model.linear.usage.tolist()
    bl.set_task(model, 0)
    model(tokens(), attention_mask=MASK)
    bl.set_task(model, [1, 1, 1, 1])
    model(tokens(), attention_mask=MASK)
    bl.set_task(model, 1)
    model.eval()(tokens(), attention_mask=MASK)
    assert usage() == [0] * E
    model.train()(tokens(), attention_mask=MASK)
    assert sum(usage()) == pytest.approx(B)
    bl.end_task(model, 0)
    model(tokens(), attention_mask=MASK)
    assert usage() == [0] * E


class Backward(TorchDispatchMode):
    """Counts the multiply-adds of dB in a backward: those of slots whose branch is not frozen."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname.endswith("lora_backward"):
            given = dict(zip([a.name for a in func._schema.arguments], args)) | (kwargs or {})
            busy = ~torch.isin(given["indices"], torch.tensor(given["frozen"], dtype=torch.int32))
            self.products.append(int(busy.sum()) * R * given["dy"].shape[1] * given["need_b"])
        return func(*args, **(kwargs or {}))


@every_reading
def test_frozen_branches_cost_no_work_in_dB(route_by):
    model, x = host(route_by), tokens()
    dy = torch.ones(B, L, D_OUT, dtype=torch.float64)

    def backward():
        with Backward() as counted:
            model(x, attention_mask=MASK).backward(dy)
        return counted.products

    layer = model.linear
    (full,) = backward()
    assert full == B * L * K * R * D_OUT
    busiest = int(layer.usage.argmax())
    slots = int((layer.routing.indices == busiest).sum())
    assert slots
    layer.frozen = [busiest]
    assert backward() == [full - slots * R * D_OUT]
    layer.frozen = range(E)
    assert backward() == [0]


@pytest.mark.skipif(BACKEND != "cpp", reason="of the C++ backend")
def test_the_kernel_reads_no_row_of_a_frozen_branch():
    """0 x NaN is NaN, so a dB that was computed and discarded would show."""
    x = tokens()[0]
    routing = lora_moe.Routing.from_ids(torch.tensor([1, 0, 1, 0, 0, 1]), num_experts=2)
    a, b = torch.randn(R, D_IN).double(), torch.randn(2 * R, D_OUT).double().requires_grad_()
    y = lora_moe.functional.grouped_lora(
        x, a, b, routing, rank_offsets=R, shared_a=True, frozen=[1]
    )
    dy = torch.ones_like(y)
    dy[[0, 2, 5]] = torch.nan  # tokens of branch 1
    (db,) = torch.autograd.grad(y, b, dy)
    assert not db[R:].any() and db[:R].isfinite().all() and db[:R].any()


@every_reading
def test_new_branches_keep_old_outputs_bit_for_bit_and_serve_new_tasks(route_by):
    model, x = host(route_by, tasks=2), tokens()
    bl.end_task(model)
    model.eval()

    def answers():
        out = []
        for task in (0, 1, [0, 1, 1, 0]):
            bl.set_task(model, task)
            out.append(model(x, attention_mask=MASK))
        return out

    before = answers()
    bl.add_branches(model, 3)
    assert all(map(torch.equal, answers(), before))
    model.train()
    bl.begin_task(model)
    learn(model)
    layer = model.linear
    assert (
        bl.routers_of(layer)[2].shape[0] == E + 3 == len(bl.branches_of(layer)) == len(layer.usage)
    )
    with torch.no_grad():  # a router that picks the new ones only
        bl.routers_of(layer)[2].zero_()[E:] = 10 * x[:, 0].sum(0)
    chosen = model(x, attention_mask=MASK) is not None and layer.routing.indices
    assert (chosen >= E).any()


def test_all_frozen_warns():
    model = host()
    bl.end_task(model, 0)
    model.linear.frozen = range(E)
    with pytest.warns(UserWarning, match="add_branches"):
        bl.begin_task(model)


def test_keys_minimize_the_loss():
    g = torch.Generator().manual_seed(0)
    text, image = torch.randn(40, 6, generator=g) + 1, torch.randn(40, 4, generator=g) - 1
    selector = TaskSelector(6, 4)
    selector.begin_task()
    for rows in torch.arange(40).split(7):
        selector.observe(text[rows], image[rows])
    keys = [torch.randn(n, generator=g, requires_grad=True) for n in (6, 4)]
    optimizer = torch.optim.Adam(keys, lr=0.05)
    for _ in range(800):
        cosines = [nn.functional.cosine_similarity(e, k[None]) for e, k in zip((text, image), keys)]
        loss = sum((1 - c).sum() for c in cosines)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss = loss.item()
    assert loss == pytest.approx(float(selector.loss(text, image)), rel=1e-5)
    assert float(selector.loss(text, image, 0.5)) == pytest.approx(loss / 2, rel=1e-5)
    for key, own in zip(keys, (selector.text_keys[0], selector.image_keys[0])):
        assert nn.functional.cosine_similarity(key, own, 0).item() > 1 - 1e-5


def test_the_nearest_key_picks_the_task():
    selector = TaskSelector(3, 2)
    for text, image in (([1.0, 0, 0], [1.0, 0]), ([0, 2.0, 0], [0, 3.0])):
        selector.begin_task()
        selector.observe(torch.tensor([text]), torch.tensor([image]))
    text = torch.tensor([[0.9, 0.5, 0], [0.2, 0.1, 5], [0.6, 0.8, 0]])
    assert selector(text).tolist() == [0, 0, 1]
    image = torch.tensor([[0.0, 1], [0, 1], [1, 0]])  # the image decides more clearly than the text
    assert selector(text, image).tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match=r"text: expected \(B, 3\), got \(3, 2\)"):
        selector(image)
    with pytest.raises(ValueError, match="without image_dim"):
        TaskSelector(3).observe(text, image)
    with pytest.raises(ValueError, match="begin_task"):
        TaskSelector(3)(text)


def test_metrics_by_hand():
    found = continual_metrics([[0.8], [0.6, 0.9], [0.5, 0.7, 0.6]])
    assert found.acc == pytest.approx(0.6)
    assert found.maa == pytest.approx((0.8 + 0.75 + 0.6) / 3)
    assert found.bwt == pytest.approx((-0.3 - 0.2) / 2)
    assert continual_metrics([[0.7, 0.1]]) == (0.7, 0.7, 0.0)
    with pytest.raises(ValueError, match="row i"):
        continual_metrics([[0.8], [0.6]])
    with pytest.raises(ValueError, match="row i"):
        continual_metrics([])
