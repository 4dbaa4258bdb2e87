"""The examples' statistics: the intervals of differences, and which runs a restart repeats."""

import numpy as np
import pytest

from examples.common import evidence


def test_intervals_tell_an_effect_from_noise():
    draw = np.random.default_rng(1)
    items = draw.normal(size=(1, 400)) + 0.1 * draw.normal(size=(3, 400))  # harder and easier items
    better = items + 0.2 + 0.1 * draw.normal(size=items.shape)
    mean, low, high = evidence.difference(better, items)
    assert low < 0.2 < high and high - low < 0.1  # paired, so it excludes the spread between items
    assert mean == pytest.approx((better - items).mean())
    assert evidence.verdict((mean, low, high)) == "yes"
    assert evidence.verdict(evidence.difference(items, better)) == "**no: the reverse**"
    assert evidence.verdict(evidence.difference(items, items)) == "**not shown**"
    assert evidence.difference(items, items) == (0, 0, 0)


def test_seeds_that_disagree_widen_the_interval():
    agreeing = np.tile(np.linspace(-1, 1, 100) + 0.5, (3, 1))
    disagreeing = agreeing + np.array([[-2.0], [0.0], [2.0]])
    assert evidence.interval(agreeing)[1] > 0 > evidence.interval(disagreeing)[1]
    assert evidence.interval([1.0, 2.0, 3.0]) == (2.0, 1.0, 3.0)
    orders = agreeing + np.array([-2.0, 0.0, 2.0])[:, None, None]  # (orders, seeds, items)
    low, high = evidence.interval(orders)[1:]
    assert low < orders[0].mean() + 0.2 and high > orders[2].mean() - 0.2
    assert evidence.interval([agreeing] * 3) == pytest.approx(evidence.interval(agreeing), abs=0.05)


def test_a_restart_repeats_no_run(tmp_path):
    calls = []

    def run(arm, seed):
        if (arm, seed) == ("b", 1) and not calls.count((arm, seed)):
            calls.append((arm, seed))
            raise KeyboardInterrupt
        calls.append((arm, seed))
        return {"score": [seed, arm]}

    with pytest.raises(KeyboardInterrupt):
        evidence.runs(tmp_path, ("a", "b"), (0, 1), run)
    found = evidence.runs(tmp_path, ("a", "b"), (0, 1), run)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("b", 1)]
    assert {key: value["score"] for key, value in found.items()} == {
        (arm, seed): [seed, arm] for arm in "ab" for seed in (0, 1)
    }


def score(arm, rate, seed):
    return {"score": -abs(rate - {"a": 1e-3, "b": 4e-3}[arm]) + seed * 1e-6}


@pytest.mark.parametrize("processes", [1, 2])
def test_every_arm_is_tuned_over_the_same_grid(tmp_path, processes):
    path = tmp_path / "rates.json"
    evidence.tune(tmp_path, path, ("a", "b"), (1e-3, 2e-3, 4e-3), [7, 8], score, processes)
    assert evidence.rates(path) == {"a": 1e-3, "b": 4e-3}
    text = evidence.tuning(path)
    assert "6 runs per arm (seeds 7, 8)" in text
    assert [line.count("**") for line in text.splitlines()[2:4]] == [2, 2]


def test_several_processes_give_the_results_of_one(tmp_path):
    def run(arm, seed):
        return {"score": [seed, arm]}

    keys = ("a", "b", "c"), (0, 1)
    one = evidence.runs(tmp_path / "one", *keys, run)
    two = evidence.runs(tmp_path / "two", *keys, run, processes=2)
    assert list(one) == list(two)
    assert [run["score"] for run in one.values()] == [run["score"] for run in two.values()]


def test_runs_of_other_settings_are_refused(tmp_path):
    def run(arm, seed):
        return {"score": 1}

    evidence.runs(tmp_path, ("a",), (0,), run, setting={"rates": {"a": 1e-3}})
    with pytest.raises(SystemExit, match="other settings: choose another --out"):
        evidence.runs(tmp_path, ("a",), (0,), run, setting={"rates": {"a": 2e-3}})
    with pytest.raises(SystemExit, match="is missing: find the rates with --tune"):
        evidence.rates(tmp_path / "rates.json")
