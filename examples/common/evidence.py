"""What the three papers' examples share: a store of finished runs, paired intervals, a table.

An example trains several arms (ways to do it) from several seeds.  All arms of a seed see the same
data and the same initial values, so differences are taken item by item, and two arms that answer
alike differ by exactly nothing.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import machine

SEEDS = (0, 1, 2)
RESAMPLES = 4000


def parser(description, out):
    """--out, --quick and --seeds, the same for each example."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{Path(out).name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for what is written")
    parser.add_argument("--quick", action="store_true", help="seconds: shows that it runs, no more")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    return parser


def runs(out, arms, seeds, run):
    """{(arm, seed): run(arm, seed)}; each result is kept in out/runs.jsonl, where a restart finds it.

    A result is what JSON holds; "seconds" is added to it.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = {(found["arm"], found["seed"]): found for found in map(json.loads, lines)}
    wanted = [(arm, seed) for seed in seeds for arm in arms]
    for arm, seed in tqdm([key for key in wanted if key not in done], unit="run"):
        started = time.perf_counter()
        found = {"arm": arm, "seed": seed} | run(arm, seed)
        found["seconds"] = time.perf_counter() - started
        with path.open("a") as file:
            file.write(json.dumps(found) + "\n")
        done[arm, seed] = found
    return {key: done[key] for key in wanted}


def interval(values):
    """(mean, low, high): 95 % bootstrap interval of the mean of (seeds, items), or of (seeds,) alone.

    Items are drawn anew within each draw of seeds: the interval speaks of other items and other
    seeds of the same kind.  Three seeds bound the second coarsely, so tables show each seed too.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    draw = np.random.default_rng(0)
    seeds, items = values.shape
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        rows = draw.integers(seeds, size=seeds)
        columns = draw.integers(items, size=items)
        means[i] = values[rows][:, columns].mean()
    return float(values.mean()), *(float(v) for v in np.quantile(means, (0.025, 0.975)))


def difference(first, second):
    """interval(first - second), item by item."""
    return interval(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64))


def shown(found, scale=100.0, digits=1):
    """`mean [low, high]`; scale 100 for shares as points."""
    mean, low, high = (scale * value for value in found)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def verdict(found):
    """What an interval of a difference says."""
    _, low, high = found
    return "yes" if low > 0 else "**no: the reverse**" if high < 0 else "**not shown**"


def table(head, rows):
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def setting(seeds, started):
    """The line under a table: machine, backend, seeds, time."""
    import lora_moe

    serving = lora_moe.backend_info()["serving"]["cpu"]
    minutes = (time.perf_counter() - started) / 60
    return f"{machine.describe()}; backend {serving}; seeds {seeds}; {minutes:.1f} minutes."
