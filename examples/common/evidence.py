"""Shared by the examples of the three papers: a store of finished runs, paired intervals, tables.

An example trains several arms (methods or variants) from several seeds.  All arms of a seed see the
same data and the same initial values, so differences are computed item by item, and two arms with
identical answers differ by exactly zero.
"""

import argparse
import json
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import machine

SEEDS = (0, 1, 2)
RESAMPLES = 4000


def parser(description, out):
    """An ArgumentParser with the options of every example: --out, --quick, --seeds and --processes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{Path(out).name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="output folder")
    parser.add_argument("--quick", action="store_true", help="a smoke test that takes seconds")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    return parser


def runs(out, arms, seeds, run, processes=1, file="runs.jsonl", setting=None):
    """{(arm, seed): run(arm, seed)}; results are saved in out/file, and a restart reuses them.

    A result is a JSON object; "seconds" is added to it.  Processes are forked, so they share what `run`
    references, and each should compute in one thread.  `setting` is everything else that determines a
    result (sizes, rates), as JSON: if the file has results of another setting, SystemExit is raised.
    """
    out.mkdir(parents=True, exist_ok=True)
    path, head = out / file, json.dumps({"setting": setting})
    if not path.exists():
        path.write_text(head + "\n")
    first, *lines = path.read_text().splitlines()
    if first != head:
        raise SystemExit(f"{path} holds runs of other settings: choose another --out or delete it")
    done = {(found["arm"], found["seed"]): found for found in map(json.loads, lines)}
    wanted = [(arm, seed) for seed in seeds for arm in arms]
    missing = [key for key in wanted if key not in done]
    for found in tqdm(
        _each(partial(_timed, run), missing, processes), total=len(missing), unit="run"
    ):
        with path.open("a") as lines:
            lines.write(json.dumps(found) + "\n")
        done[found["arm"], found["seed"]] = found
    return {key: done[key] for key in wanted}


def _timed(run, arm, seed):
    started = time.perf_counter()
    found = {"arm": arm, "seed": seed} | run(arm, seed)
    return found | {"seconds": time.perf_counter() - started}


def _each(call, keys, processes):
    """Yields call(*key) for each key, in the order in which they finish."""
    if processes < 2:
        yield from (call(*key) for key in keys)
        return
    global _forked  # a forked process inherits it: models and closures need not be pickled
    _forked = call
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(_call_forked, keys)


def _call_forked(key):
    return _forked(*key)


def tune(out, path, arms, grid, seeds, run, processes=1, setting=None):
    """Runs every arm at every rate of the grid with separate tuning seeds; all arms get the same budget.

    Args:
        path: the JSON file to write, stored with the protocol; `rates` and `tuning` read it.
        run: run(arm, rate, seed) -> {"score": score on the validation items, higher is better}.
        setting: see `runs`.
    """
    keys = {f"{arm} at {rate:g}": (arm, rate) for arm in arms for rate in grid}

    def score(key, seed):
        return run(*keys[key], seed)

    found = runs(out, keys, seeds, score, processes, "tuning.jsonl", setting)

    def scores_of(arm, rate):
        return [round(found[f"{arm} at {rate:g}", seed]["score"], 5) for seed in seeds]

    scores = {arm: {f"{rate:g}": scores_of(arm, rate) for rate in grid} for arm in arms}
    minutes = sum(each["seconds"] for each in found.values()) / 60
    arms = ",\n".join(f"  {json.dumps(arm)}: {json.dumps(of)}" for arm, of in scores.items())
    head = f'"seeds": {json.dumps(seeds)},\n "minutes": {minutes:.1f},\n "scores": '
    path.write_text("{" + head + "{\n" + arms + "\n}}\n")  # one line per arm


def rates(path):
    """{arm: best rate}, by the mean score over the tuning seeds."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: find the rates with --tune first")
    scores = json.loads(path.read_text())["scores"]
    return {arm: float(max(of, key=lambda rate: np.mean(of[rate]))) for arm, of in scores.items()}


def tuning(path, scale=100.0, digits=1):
    """The tuning grid as a Markdown table, followed by the budget; each arm's best rate is bold."""
    found, best = json.loads(path.read_text()), rates(path)
    grid = list(next(iter(found["scores"].values())))
    rows = []
    for arm, of in found["scores"].items():
        cells = {rate: f"{scale * np.mean(values):.{digits}f}" for rate, values in of.items()}
        rows.append([arm, *(f"**{c}**" if float(r) == best[arm] else c for r, c in cells.items())])
    count = len(grid) * len(found["seeds"])
    seeds, minutes = _listed(found["seeds"]), found["minutes"]
    budget = f"{count} runs per arm (seeds {seeds}), {minutes:.0f} minutes of one process."
    return table(["validation score at rate", *grid], rows) + "\n\n" + budget


def interval(values):
    """(mean, low, high): 95 % bootstrap interval of the mean of (seeds, items), or of (seeds,) alone.

    Items are resampled within each resample of seeds, so the interval covers both other items and
    other seeds.  Three seeds give only a coarse bound on the latter, so tables also show each seed.
    Any leading axis, as in (orders, seeds, items), is resampled in the same way.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    draw = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = [draw.integers(size, size=size) for size in values.shape]
        means[i] = values[np.ix_(*drawn)].mean()
    return float(values.mean()), *(float(v) for v in np.quantile(means, (0.025, 0.975)))


def difference(first, second):
    """interval(first - second), item by item."""
    return interval(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64))


def shown(found, scale=100.0, digits=1):
    """The interval as `mean [low, high]`; scale=100 shows shares in points."""
    mean, low, high = (scale * value for value in found)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def verdict(found):
    """Whether the interval of a difference lies above zero, below zero, or contains it, in words."""
    _, low, high = found
    return "yes" if low > 0 else "**no: the reverse**" if high < 0 else "**not shown**"


def table(head, rows):
    """A Markdown table; the first column is left-aligned text, the others are right-aligned numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def setting(seeds, started):
    """The line under a table: machine, backend, seeds, time."""
    import lora_moe

    serving = lora_moe.backend_info()["serving"]["cpu"]
    minutes = (time.perf_counter() - started) / 60
    return (
        f"{machine.describe()}; backend {serving}; seeds {_listed(seeds)}; {minutes:.1f} minutes."
    )


def _listed(seeds):
    return ", ".join(map(str, seeds))
