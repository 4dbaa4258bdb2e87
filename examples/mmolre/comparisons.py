"""Which of MMoLRE's claims the runs show: differences between arms, with intervals."""

import statistics

import numpy as np

from examples.common import evidence

FIRST, FULL = "MMoLRE", "full-rank experts"
LOW = ("MMoLRE, rank 2", FIRST, "MMoLRE, rank 32")  # against FULL
COMPARED = {  # other arms (sentiment's, emotion's): what it says that ours is better
    ("hard sharing",) * 2: "shared and task experts beat hard sharing at equal parameters",
    ("hard sharing, rank 2",) * 2: "the same with all ranks 2",
    ("no task experts",) * 2: "task-specific experts beat as many more shared ones",
    ("text alone",) * 2: "both modalities matter: more than the text",
    ("image alone",) * 2: "both modalities matter: more than the image",
    ("sentiment alone", "emotion alone"): "two tasks in one model beat a model for each",
}
OURS_AT = {"hard sharing, rank 2": "MMoLRE, rank 2"}  # FIRST for the others
MARGINS = {"error": 0.05, "f1": 0.02}  # similar quality: at most this much worse
RESAMPLES = 2000


def compared(found, arms, seeds, held_out):
    """[(other arm, claim, sentiment's difference, emotion's)], intervals of what ours is better by."""
    truth = held_out.labels["emotion"].numpy() > 0.5
    rows = []
    for (first, second), claim in COMPARED.items():
        ours = OURS_AT.get(first, FIRST)
        if not {first, second, ours} <= set(arms):
            continue
        name = first if first == second else "one task alone"
        error = evidence.difference(
            *([found[arm, seed]["error"] for seed in seeds] for arm in (first, ours))
        )
        rows.append((name, claim, error, f1_difference(found, ours, second, seeds, truth)))
    return rows


def f1_difference(found, first, second, seeds, truth):
    """evidence.difference of weighted F1, first less second; it is no mean over items, so drawn anew."""
    picked = [np.array([found[arm, s]["labels"] for s in seeds]) > 0 for arm in (first, second)]
    draw, (count, items) = np.random.default_rng(0), picked[0].shape[:2]

    def difference(rows, columns):
        scores = [[_weighted_f1(p[row][columns], truth[columns]) for row in rows] for p in picked]
        return np.mean(scores[0]) - np.mean(scores[1])

    means = [
        difference(draw.integers(count, size=count), draw.integers(items, size=items))
        for _ in range(RESAMPLES)
    ]
    middle = difference(range(count), np.arange(items))
    return float(middle), *(float(v) for v in np.quantile(means, (0.025, 0.975)))


def _weighted_f1(picked, true):
    """As affect.multilabel_metrics; (N, 6) bool."""
    hits, support = (picked & true).sum(0), true.sum(0)
    f1 = 2 * hits / np.maximum(picked.sum(0) + support, 1)
    return (f1 * support).sum() / max(support.sum(), 1)


def claims(rows):
    head = ["claim", "sentiment: MAE saved", "shown", "emotion: points of weighted F1", "shown"]
    return rows and evidence.table(
        head,
        [
            [
                claim,
                evidence.shown(error, 1, 3),
                evidence.verdict(error),
                evidence.shown(f1, 100, 1),
                evidence.verdict(f1),
            ]
            for _, claim, error, f1 in rows
        ],
    )


def full_rank(found, seeds, held_out):
    """Low-rank experts against full-rank ones: similar quality for fewer parameters and less time?"""
    full, truth = FULL, held_out.labels["emotion"].numpy() > 0.5

    def median(arm, name):
        return statistics.median(found[arm, seed][name] for seed in seeds)

    head = [
        "against full-rank experts",
        "parameters",
        "CPU seconds to train",
        "MAE worse by",
        f"at most {MARGINS['error']}",
        "points of weighted F1 lower by",
        f"at most {100 * MARGINS['f1']:.0f}",
    ]
    rows = []
    for arm in LOW:
        error = evidence.difference(*([found[a, s]["error"] for s in seeds] for a in (arm, full)))
        f1 = f1_difference(found, full, arm, seeds, truth)
        ratios = (
            f"{median(arm, k) / median(full, k):.2f} times" for k in ("parameters", "trained")
        )
        similar = (error[2] <= MARGINS["error"], f1[2] <= MARGINS["f1"])
        one, two = ("yes" if holds else "**not shown**" for holds in similar)
        name = f"{FIRST}, rank 8" if arm == FIRST else arm
        rows.append(
            [name, *ratios, evidence.shown(error, 1, 3), one, evidence.shown(f1, 100, 1), two]
        )
    return evidence.table(head, rows)


def agreement(found, arms, seeds):
    """Do the tasks pull the shared parameters apart?  Cosines of their gradients under hard sharing."""
    rows = []
    for arm in (arm for arm in arms if "hard sharing" in arm):
        cosines = np.array([found[arm, seed]["cosines"] for seed in seeds])
        thirds = np.array_split(cosines, 3, axis=1)
        thirds = [f"{part.mean():+.2f}" if part.size else "" for part in thirds]
        rows.append([arm, *thirds, f"{(cosines < 0).mean():.0%}"])
    head = [
        "cosine of the two tasks' gradients",
        "first third",
        "second",
        "last",
        "steps below zero",
    ]
    return evidence.table(head, rows) if rows else ""
