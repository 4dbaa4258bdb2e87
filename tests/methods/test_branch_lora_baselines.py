"""The baselines in BranchLoRA's evidence against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

import lora_moe

transformers = pytest.importorskip("transformers")

from examples.branch_lora import arms  # noqa: E402
from examples.branch_lora.baselines import Ewc, Lwf  # noqa: E402
from examples.branch_lora.data import BATCH, Batch, mixed  # noqa: E402
from examples.branch_lora.learners import TOTAL, Branched, Learner, PerTask  # noqa: E402
from examples.common import minilm  # noqa: E402
from examples.common.training import optimizer_of  # noqa: E402

D, A = 16, 5  # width, answers


def learner_of(kind, *options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=D, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).requires_grad_(False)
    targets = normalize(torch.randn(A, D), dim=1)
    learner = kind(minilm.Upper(model, 0), targets, *options)
    for layer in lora_moe.injected(learner.model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)  # nonzero, as after some steps
    return learner


def batches_of(answers, count=2, items=4, seed=1):
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.arange(6) < torch.tensor([[6], [3], [4], [5]])).long()
    return [
        Batch(
            torch.randn(items, 6, D, generator=draw),
            mask[:items],
            torch.tensor(answers)[torch.randint(len(answers), (items,), generator=draw)],
            torch.randn(items, D, generator=draw),
        )
        for _ in range(count)
    ]


def step(learner, batches):
    """Takes a large step and returns the loss before it."""
    optimizer = optimizer_of(learner.model, 1e-2)
    loss = learner.loss(0, batches[0])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def plain(learner, batch):
    return cross_entropy(learner.scores(batch), batch.wanted)


def test_ewc_penalizes_changes_of_what_the_last_task_needed():
    learner, batches = learner_of(Ewc, 50.0), batches_of([0, 1])
    learner.begin(batches)
    assert learner.loss(0, batches[0]).item() == plain(learner, batches[0]).item()
    learner.end(batches)
    anchor = [p.detach().clone() for p in learner.learned]
    learner.begin(batches)
    step(learner, batches)
    by_hand = 0.0
    for fisher, parameter, before in zip(learner.fisher, learner.learned, anchor, strict=True):
        for f, p, was in zip(*(t.detach().flatten() for t in (fisher, parameter, before))):
            by_hand += float(f) * float(p - was) ** 2
    assert by_hand > 0
    added = learner.loss(1, batches[1]) - plain(learner, batches[1])
    assert added.item() == pytest.approx(50 / 2 * by_hand, rel=1e-3)
    learner.end(batches)
    assert learner.penalty() == 0  # the next task is anchored here


def test_the_fisher_of_ewc_is_the_mean_of_squared_gradients_over_sampled_answers():
    learner, (batch,) = learner_of(Ewc, 1.0), batches_of([0, 1], count=1)
    exact = 0.0
    for i in range(len(batch.wanted)):
        logs = learner.scores(Batch(*(field[i : i + 1] for field in batch))).log_softmax(1)[0]
        for log in logs:
            gradients = torch.autograd.grad(log, learner.learned, retain_graph=True)
            square = sum(float(g.square().sum()) for g in gradients)
            exact += log.exp().item() * square / len(batch.wanted)
    estimates = []
    for _ in range(300):
        for fisher in learner.fisher:
            fisher.zero_()
        learner.end([batch])
        estimates.append(sum(float(f.sum()) for f in learner.fisher))
    estimates = torch.tensor(estimates)
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / len(estimates) ** 0.5
    assert estimates.std() / len(estimates) ** 0.5 < 0.1 * exact


def test_lwf_keeps_the_old_models_answers_on_the_new_items():
    learner, old, new = learner_of(Lwf, 0.7), batches_of([0, 3]), batches_of([1, 2], seed=2)
    learner.begin(old)
    assert learner.loss(0, old[0]).item() == plain(learner, old[0]).item()
    learner.end(old)
    with torch.no_grad():
        before = [learner.scores(batch) for batch in new]
    learner.begin(new)
    step(learner, new)
    for number, batch in enumerate(new):
        z, by_hand = learner.scores(batch), 0.0
        for i in range(len(z)):
            q, p = (torch.tensor([s[i, 0] / 2, s[i, 3] / 2]).exp() for s in (before[number], z))
            by_hand -= float((q / q.sum() * (p / p.sum()).log()).sum()) / len(z)
        added = learner.loss(number, batch) - plain(learner, batch)
        assert added.item() == pytest.approx(0.7 * by_hand, rel=1e-4)
    learner.end(new)
    assert learner.seen == [0, 1, 2, 3]


def test_loras_per_task_have_the_size_of_one_and_keep_old_tasks():
    learner, batches = learner_of(PerTask, 3), batches_of([0, 1])
    layers = lora_moe.injected(learner.model).values()
    one = learner_of(Learner)
    learner.begin(batches)
    trained = [learner.trained()]
    step(learner, batches)
    learner.end(batches)
    learner.choose(torch.zeros(4, dtype=torch.long))
    known = learner.scores(batches[1])
    learner.begin(batches)
    trained.append(learner.trained())
    step(learner, batches)
    learner.end(batches)
    assert {sum(layer.config.ranks) for layer in layers} == {TOTAL}
    assert {s for layer in layers for s in layer.config.scales} == {2.0}
    ranks = next(iter(layers)).config.ranks
    assert trained == [one.trained() * r / TOTAL for r in ranks[:2]]
    learner.choose(torch.tensor([0, 1, 0, 1]))
    again = learner.scores(batches[1])
    assert torch.equal(again[0::2], known[0::2]) and not torch.allclose(again[1::2], known[1::2])


def test_arms_have_the_same_scale():
    for learner in (learner_of(Learner), learner_of(Learner, 8), learner_of(Branched, arms.Rung())):
        layers = lora_moe.injected(learner.model).values()
        assert {s for layer in layers for s in layer.config.scales} == {2.0}


def test_joint_training_sees_every_item_once_and_unchanged():
    lessons = [batches_of([t], count=3, items=4 - t, seed=t) for t in range(3)]
    learner, batches = learner_of(Learner), mixed(lessons, 0)
    count = sum(len(b.wanted) for lesson in lessons for b in lesson)
    assert [len(b.wanted) for b in batches] == [BATCH, count - BATCH]
    assert all(len(b.wanted.unique()) > 1 for b in batches)
    seen = {}
    for batch in (b for lesson in lessons for b in lesson):
        seen |= zip(map(tuple, batch.frozen.tolist()), learner.scores(batch))
    for batch in batches:
        for key, scores in zip(map(tuple, batch.frozen.tolist()), learner.scores(batch)):
            assert torch.allclose(seen.pop(key), scores, atol=1e-4)
    assert not seen
