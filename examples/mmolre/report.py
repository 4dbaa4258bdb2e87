"""Results of the runs of examples/mmolre/experiment.py: tables in Markdown, and a plot."""

import math
import statistics

import numpy as np

from examples.common import evidence
from examples.mmolre import data
from examples.mmolre.arms import TASKS
from examples.mmolre.comparisons import FIRST, HARD, Conflict, claims, full_rank, gains, losses
from examples.mmolre.losses import spread
from examples.mmolre.pictures import draw_gains

COLUMNS = (  # (head, task, metric, format)
    ("sentiment: MAE", "sentiment", "mae", "{:.3f}"),
    ("Corr", "sentiment", "corr", "{:.3f}"),
    ("Acc-7", "sentiment", "acc7", "{:.1%}"),
    ("Acc-2 (< 0, > 0)", "sentiment", "acc2_positive", "{:.1%}"),
    ("F1", "sentiment", "f1_positive", "{:.1%}"),
    *((f"{task}: weighted F1", task, "weighted_f1", "{:.1%}") for task in list(TASKS)[1:]),
)


def write(args, study, found, rates, setting):
    """Writes results.md and the plot to args.out; prints the former."""
    seeds, arms = args.seeds, args.arms
    minutes = sum(run["trained"] for run in found.values()) / 60
    parts = [
        described(study),
        evidence.tuning(rates),
        quality(study, found, arms, seeds),
        normalized(study, found, arms, seeds),
        each_seed(found, arms, seeds),
        claims(found, arms, seeds),
        full_rank(found, arms, seeds),
        Conflict(found, seeds).table() if HARD in arms else "",
        own_gates(found, seeds) if FIRST in arms else "",
        f"{setting} The arms trained for {minutes:.1f} CPU minutes.",
        "\n".join(f"- {source}" for source in data.SOURCES),
    ]
    text = "\n\n".join(filter(None, parts))
    (args.out / "results.md").write_text(text + "\n")
    print(text)
    if {FIRST, HARD} <= set(arms):
        draw_gains(args.out / "gains.png", gain_and_cosine(found, seeds))


def described(study):
    counts = ", ".join(
        f"{len(getattr(study, split).labels['sentiment'])} {split}"
        for split in ("validation", "test")
    )
    labeled = ", ".join(f"{task} {share:.0%}" for task, share in study.labeled.items())
    return (
        f"{len(study.words.split['train']):,} words and {len(study.kaomoji.split['train']):,} kaomoji"
        f" to train from; {counts} items; labeled: {labeled}; {study.sizes.steps} steps of"
        f" {study.sizes.batch} items."
    )


def quality(study, found, arms, seeds):
    """Table of the standard metrics, means over seeds."""
    head = ["arm", "parameters", *(name for name, *_ in COLUMNS), "CPU seconds to train"]
    constant = [{"tasks": _constant(study)}]
    rows = [["constant predictor", "", *_metrics(constant), ""]]
    for arm in arms:
        runs = [found[arm, seed] for seed in seeds]
        seconds = statistics.median(run["trained"] for run in runs)
        rows.append([arm, f"{runs[0]['parameters']:,}", *_metrics(runs), f"{seconds:.0f}"])
    return evidence.table(head, rows)


def _constant(study):
    return study.judge(spread(study.constants, study.test.labels))


def _metrics(runs):
    means = [
        (text, statistics.mean(run["tasks"][task][metric] for run in runs))
        for _, task, metric, text in COLUMNS
    ]
    return ["" if math.isnan(mean) else text.format(mean) for text, mean in means]


def normalized(study, found, arms, seeds):
    """Table of validation and test losses at the best look, means over seeds; constant predictor: 1."""
    test = losses({("constant", 0): {"tasks": _constant(study)}}, "constant", [0])
    rows = [["constant predictor", *_pairs([1.0] * len(TASKS), _mean(test)), ""]]
    for arm in arms:
        runs = [found[arm, seed] for seed in seeds]
        validation = [statistics.mean(run["validation"][task] for run in runs) for task in TASKS]
        steps = [step for run in runs for step in run["steps"]]
        steps = f"{min(steps)} to {max(steps)}"
        rows.append([arm, *_pairs(validation, _mean(losses(found, arm, seeds))), steps])
    head = ["loss, validation / test", "mean over tasks", *TASKS, "stopped at steps"]
    return evidence.table(head, rows)


def _pairs(validation, test):
    """["validation / test"] for the mean over tasks and for each task."""
    return [
        f"{v:.3f} / {t:.3f}" for v, t in zip(*([np.mean(of), *of] for of in (validation, test)))
    ]


def _mean(values):
    """(seeds, items, tasks) -> mean over the labeled items of each task."""
    return np.nanmean(values, (0, 1)).tolist()


def each_seed(found, arms, seeds):
    """Table of the normalized test loss per seed, mean over tasks."""
    rows = [
        [arm, *(f"{statistics.mean(_mean(losses(found, arm, [s]))):.3f}" for s in seeds)]
        for arm in arms
    ]
    return evidence.table(["mean test loss", *(f"seed {seed}" for seed in seeds)], rows)


def own_gates(found, seeds):
    shares = [found[FIRST, seed]["own gates"] for seed in seeds]
    cells = [f"{statistics.mean(of[task] for of in shares):.0%}" for task in TASKS]
    return evidence.table(["MMoLRE", *TASKS], [["mean gate of the task's own expert", *cells]])


def gain_and_cosine(found, seeds):
    """[(task, interval of the cosine with the rest, interval of MMoLRE's gain over hard sharing)]"""
    cosines = Conflict(found, seeds).with_rest.mean(1)  # (seeds, tasks)
    saved = gains(found, FIRST, HARD, seeds)
    return [(task, evidence.interval(cosines[:, t]), saved[task]) for t, task in enumerate(TASKS)]
