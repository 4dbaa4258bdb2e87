"""The claims of MMoLRE as differences of normalized test losses, with intervals."""

import statistics

import numpy as np

from examples.common import evidence
from examples.mmolre.arms import TASKS

FIRST, HARD, FULL, ALONE = "MMoLRE", "hard sharing", "full-rank experts", "each task alone"
SHARED, ROUTER = "no task experts", "no task experts, one router"
LOW = ("MMoLRE, rank 2", FIRST, "MMoLRE, rank 32")  # against FULL
COMPARED = (  # (what it says, the better arm, the other)
    ("**MMoLRE beats hard sharing at equal parameters**", FIRST, HARD),
    ("... because of the tasks' own experts", FIRST, SHARED),
    ("... because of the tasks' own routers and streams", SHARED, ROUTER),
    ("... because of the tasks' own fusion", ROUTER, HARD),
    ("each task alone beats hard sharing: there is a conflict to avoid", ALONE, HARD),
    ("**MMoLRE beats one model per task of equal total size**", FIRST, "one model per task, equal size"),
    ("MMoLRE beats each task alone", FIRST, ALONE),
    ("MMoLRE needs the image", FIRST, "text alone"),
    ("MMoLRE needs the text", FIRST, "image alone"),
)  # fmt: skip
MARGIN = 0.02  # similar quality: the mean loss is at most this much higher
MEAN = "mean"


def losses(found, arm, seeds):
    """Normalized losses (seeds, items, tasks); NaN where a label is missing."""
    return np.array(
        [np.transpose([found[arm, s]["tasks"][t]["losses"] for t in TASKS]) for s in seeds],
        dtype=np.float64,
    )


def gains(found, first, second, seeds):
    """{"mean" or task: (mean, low, high)} of the loss that the first arm saves against the second.

    Like evidence.interval, but each task's mean is over the labeled items of a resample, and the mean
    over tasks is computed from the same resample.
    """
    saved = losses(found, second, seeds) - losses(found, first, seeds)  # (seeds, items, tasks)
    (count, items, _), there = saved.shape, ~np.isnan(saved[0])
    draw = np.random.default_rng(0)  # draws how often each seed and each item is counted
    rows, columns = (
        draw.multinomial(n, np.full(n, 1 / n), evidence.RESAMPLES) for n in (count, items)
    )
    summed = np.einsum("rs,rn,snt->rt", rows / count, columns, np.nan_to_num(saved), optimize=True)
    low, high = np.quantile(_with_mean(summed / (columns @ there)), (0.025, 0.975), axis=0)
    middle = _with_mean(np.nanmean(saved, axis=(0, 1)))
    return {name: tuple(map(float, of)) for name, of in zip((MEAN, *TASKS), zip(middle, low, high))}


def _with_mean(each):
    """(..., tasks) -> (..., 1 + tasks), with the mean over tasks first."""
    return np.concatenate([each.mean(-1, keepdims=True), each], -1)


def claims(found, arms, seeds):
    """Table of the loss that each comparison's first arm saves, in points of the constant predictor's."""
    rows = []
    for claim, first, second in COMPARED:
        if {first, second} <= set(arms):
            saved = gains(found, first, second, seeds)
            verdict = evidence.verdict(saved[MEAN])
            rows.append([claim, evidence.shown(saved[MEAN]), verdict])
            rows[-1] += [evidence.shown(saved[task]) for task in TASKS]
    head = ["points of loss saved", "mean over tasks", "shown", *TASKS]
    return evidence.table(head, rows) if rows else ""


def full_rank(found, arms, seeds):
    """Low-rank experts against full-rank ones: similar quality for fewer parameters and less time?"""
    if not {FULL, *LOW} <= set(arms):
        return ""

    def ratio(arm, name):
        of, full = (statistics.median(found[a, s][name] for s in seeds) for a in (arm, FULL))
        return f"{of / full:.2f} times"

    rows = []
    for arm in LOW:
        saved = gains(found, FULL, arm, seeds)
        similar = "yes" if saved[MEAN][2] <= MARGIN else "**not shown**"
        name = f"{FIRST}, rank 8" if arm == FIRST else arm
        rows.append([name, ratio(arm, "parameters"), ratio(arm, "trained")])
        rows[-1] += [evidence.shown(saved[MEAN]), similar]
        rows[-1] += [evidence.shown(saved[task]) for task in TASKS]
    head = ["against full-rank experts", "parameters", "CPU seconds to train"]
    head += ["mean loss higher by, points", f"at most {100 * MARGIN:.0f}", *TASKS]
    return evidence.table(head, rows)


class Conflict:
    """Inner products of the tasks' gradients under hard sharing, (seeds, looks, tasks, tasks)."""

    def __init__(self, found, seeds):
        inner = np.array([found[HARD, seed]["gradients"] for seed in seeds])
        own = np.diagonal(inner, axis1=2, axis2=3)  # (seeds, looks, tasks)
        norm, row = np.sqrt(own), inner.sum(-1)
        rest = np.sqrt(inner.sum((2, 3))[..., None] - 2 * row + own)  # |sum of the others|
        self.pairs = inner / (norm[..., None] * norm[..., None, :])
        self.with_rest = (row - own) / (norm * rest)
        others = (norm.sum(-1, keepdims=True) - norm) / (len(TASKS) - 1)
        self.ratio = norm / others

    def table(self):
        """A row per task: cosines with the others and with their sum, by thirds of training."""
        rows = []
        for t, task in enumerate(TASKS):
            pairs = [
                "" if s == t else f"{self.pairs[..., t, s].mean():+.2f}" for s in range(len(TASKS))
            ]
            cosine, ratio = self.with_rest[..., t], self.ratio[..., t]
            below = f"{(cosine < 0).mean():.0%}"
            rows.append([task, *pairs, *_thirds(cosine, "+.2f"), below, *_thirds(ratio, ".2f")])
        head = ["cosine with", *TASKS]
        head += ["the rest, first third", "second", "last", "below zero"]
        head += ["norm by the others' mean, first third", "second", "last"]
        return evidence.table(head, rows)


def _thirds(values, form):
    """Formatted means over each third of the looks (axis 1)."""
    return [f"{part.mean():{form}}" for part in np.array_split(values, 3, axis=1) if part.size]
