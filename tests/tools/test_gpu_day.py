"""The driver for the first day with a GPU: it reports failures, keeps passed stages and ends in time.

The stages themselves run at small sizes with `python -m benchmarks.gpu_day --dry-run`.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks.gpu_day import driver, stages
from benchmarks.gpu_day.driver import Stage, finding


@pytest.fixture
def day(monkeypatch, tmp_path):
    """Two stages without processes; a test sets their results."""
    results = {"one": [finding("a", True)], "two": [finding("b", True)]}
    ran = []

    def run(stage, out, dry_run, limit):
        ran.append((stage.name, limit))
        return {"seconds": 1.0, "findings": results[stage.name]}

    monkeypatch.setattr(driver, "STAGES", [Stage("one", 10, "x"), Stage("two", 20, "y")])
    monkeypatch.setattr(driver, "run", run)
    monkeypatch.setattr(driver, "why_no_gpu", lambda: None)

    def call(*options):
        ran.clear()
        status = driver.main([*options, "--out", str(tmp_path)])
        return status, [name for name, _ in ran], (tmp_path / "report.md").read_text()

    call.results, call.ran = results, ran
    return call


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert driver.main(["--out", str(tmp_path / "new")]) == 3
    assert "no GPU that this PyTorch can use" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_without_pytorch_it_says_which_python(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert driver.main(["--out", str(tmp_path / "new")]) == 3
    assert f"{sys.executable} has no PyTorch" in capsys.readouterr().out


def test_all_checks_pass(day):
    status, ran, report = day()
    assert (status, ran) == (0, ["one", "two"])
    assert "All checks passed" in report
    assert report.count("1 check passed") == 2


def test_failures_come_first_and_set_the_exit_status(day):
    day.results["one"] = [finding("bits", False, "they differ"), finding("fact", None, "7")]
    status, ran, report = day()
    assert (status, ran) == (1, ["one", "two"])
    assert report.index("**failed** in one: bits: they differ") < report.index("| stage |")
    assert "1 of 1 failed" in report


def test_a_second_call_repeats_failed_and_named_stages(day):
    day.results["one"] = [finding("bits", False)]
    day()
    day.results["one"] = [finding("bits", True)]
    assert day()[:2] == (0, ["one"])
    assert day()[:2] == (0, [])
    assert day("--stages", "two")[:2] == (0, ["two"])


def test_a_call_ends_in_time_and_asks_for_another(day, monkeypatch, capsys):
    clock = iter([0, 0, driver.CALL_S - 1])
    monkeypatch.setattr(driver.time, "monotonic", lambda: next(clock))
    status, ran, report = day()
    assert (status, ran) == (2, ["one"])
    assert "not run yet" in report
    assert "stages left: 1; run again to continue" in capsys.readouterr().out


def test_unknown_stages_are_refused(day):
    with pytest.raises(SystemExit, match="expected some of one, two, got three"):
        day("--stages", "three")


SAYS = """print('{"what": "a", "ok": true, "detail": ""}')"""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (SAYS, []),
        (f"{SAYS}; raise ValueError('too bad')", ["ran to completion"]),
        (f"import time; {SAYS}; time.sleep(60)", ["finished in time"]),
        ("pass", ["reported findings"]),
    ],
    ids=["right", "raises", "hangs", "silent"],
)
def test_a_stage_that_ends_badly_is_a_finding(command, expected, tmp_path, monkeypatch):
    real = driver.subprocess.run

    def run(argv, **options):
        return real([argv[0], "-u", "-c", command], **options)

    monkeypatch.setattr(driver.subprocess, "run", run)
    result = driver.run(Stage("one", 5, "x"), tmp_path, True, 3)
    assert [f["what"] for f in driver.wrong(result)] == expected
    if expected == ["ran to completion"]:
        assert "too bad" in result["findings"][-1]["detail"]
    if expected == ["finished in time"]:  # findings before the timeout are kept
        assert result["findings"][0]["what"] == "a"


def test_counters_of_ncu_are_read():
    text = "==PROF== noise\n" + stages.SAMPLE
    assert stages.read_counters(text) == {"_rank_dense_kernel": 135.2e6 + 67_108_864}
    assert stages.read_counters("==ERROR== no permission") == {}


def test_the_tiles_stage_sees_a_wrong_result(monkeypatch):
    """In each result in turn, and in a second run with other bits."""
    from benchmarks.gpu_day import tiles

    said = []
    v = tiles.sample(33, 4, (48, 40), torch.bfloat16, "cpu")
    real = tiles.ours

    def check(spoil):
        said.clear()
        monkeypatch.setattr(tiles, "ours", lambda *args: spoil(list(real(*args))))
        tiles.check(
            lambda what, ok, detail="": said.append((what.split(": ")[1], ok)), "x", None, *v
        )
        return {what for what, ok in said if not ok}

    assert check(lambda out: out) == set()
    names = ["y", "dx", "dW", "dA", "dB"]
    for i, name in enumerate(names, start=1):
        assert check(lambda out, i=i: [*out[:i], out[i] * 1.02, *out[i + 1 :]]) == {name}
    calls = iter(range(2))
    assert "equal bits twice" in check(lambda out: [out[0], out[1] + next(calls), *out[2:]])
    assert json.dumps(said)
