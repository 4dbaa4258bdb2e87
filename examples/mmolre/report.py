"""What the runs of examples/mmolre/experiment.py say: tables in Markdown, and two pictures."""

import statistics

import matplotlib

matplotlib.use("Agg")  # writes files, needs no screen

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import timing
from examples.common import evidence
from examples.common.figures import GREY, INK, OURS, STYLE, WHITE_TO_BLUE
from examples.mmolre import data as mmolre_data

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
COLUMNS = (  # (head, task, metric, format)
    ("MAE", "sentiment", "mae", "{:.3f}"),
    ("Corr", "sentiment", "corr", "{:.3f}"),
    ("Acc-7", "sentiment", "acc7", "{:.1%}"),
    ("Acc-2 (< 0, >= 0)", "sentiment", "acc2_non_negative", "{:.1%}"),
    ("F1", "sentiment", "f1_non_negative", "{:.1%}"),
    ("Acc-2 (< 0, > 0)", "sentiment", "acc2_positive", "{:.1%}"),
    ("F1", "sentiment", "f1_positive", "{:.1%}"),
    ("labels right", "emotion", "accuracy", "{:.1%}"),
    ("weighted F1", "emotion", "weighted_f1", "{:.1%}"),
)


def write(args, sizes, data, found, times, setting):
    """results.md and the pictures into args.out; prints the former."""
    seeds, arms, held_out = args.seeds, args.arms, data[2]
    rows = compared(found, arms, seeds, held_out)
    trained = sum(run["trained"] for run in found.values()) / 60
    parts = [
        described(sizes, data),
        quality(found, arms, seeds, held_out),
        each_seed(found, arms, seeds),
        claims(rows),
        full_rank(found, seeds, held_out) if {FULL, *LOW} <= set(arms) else "",
        agreement(found, arms, seeds),
        steps(times, sizes.timed),
        f"{setting} The arms trained for {trained:.1f} CPU minutes.",
        "\n".join(f"- {source}" for source in mmolre_data.SOURCES),
    ]
    text = "\n\n".join(filter(None, parts))
    (args.out / "results.md").write_text(text + "\n")
    print(text)
    if rows:
        draw_differences(args.out / "differences.png", rows)
    if FIRST in arms:
        draw_gates(args.out / "gates.png", [found[FIRST, seed]["gates"] for seed in seeds])


def described(sizes, data):
    words, kaomoji, held_out = data
    count = len(held_out.labels["sentiment"])
    return (
        f"{len(words.split['train']):,} words and {len(kaomoji.split['train']):,} kaomoji to train from,"
        f" {count:,} held-out items of {len(words.split['test']):,} other words and"
        f" {len(kaomoji.split['test']):,} other kaomoji; {sizes.steps} steps of {sizes.batch} items."
    )


def quality(found, arms, seeds, held_out):
    """Means over seeds."""
    head = ["arm", "parameters", *(name for name, *_ in COLUMNS), "CPU seconds to train"]
    rows = [
        ["median, or no emotion", "", *(_constant(held_out, *column) for column in COLUMNS), ""]
    ]
    for arm in arms:
        runs = [found[arm, seed] for seed in seeds]
        cells = [
            text.format(statistics.mean(r[task][metric] for r in runs)) if task in runs[0] else ""
            for _, task, metric, text in COLUMNS
        ]
        seconds = statistics.median(run["trained"] for run in runs)
        rows.append([arm, f"{runs[0]['parameters']:,}", *cells, f"{seconds:.0f}"])
    return evidence.table(head, rows)


def _constant(held_out, _, task, metric, text):
    """What the best constant gets: the median score, and no emotion at all (under a half each)."""
    if metric == "mae":
        score = held_out.labels["sentiment"]
        return text.format(float((score - score.median()).abs().mean()))
    if metric == "accuracy":
        share = held_out.labels["emotion"].mean(0)
        return text.format(float(share.maximum(1 - share).mean()))
    return ""


def each_seed(found, arms, seeds):
    head = ["arm", *(f"MAE, seed {s}" for s in seeds), *(f"weighted F1, seed {s}" for s in seeds)]
    rows = []
    for arm in arms:
        runs = [found[arm, seed] for seed in seeds]
        errors = [f"{r['sentiment']['mae']:.3f}" if "sentiment" in r else "" for r in runs]
        f1 = [f"{r['emotion']['weighted_f1']:.1%}" if "emotion" in r else "" for r in runs]
        rows.append([arm, *errors, *f1])
    return evidence.table(head, rows)


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


def steps(times, timed):
    """Forward and backward of one block; medians of interleaved turns."""
    width, rank, items, length, turns = timed
    first = next(iter(times.values()))[1]
    rows = [
        [name, f"{size:,}", f"{1e3 * statistics.median(t):.1f} ms", timing.ratio(t, first)]
        for name, (size, t) in times.items()
    ]
    head = [
        f"one block, width {width}, rank {rank}, {items} x {length} positions, fp32, 1 thread",
        "parameters",
        f"forward and backward, median of {turns}",
        "times ours [quartiles]",
    ]
    return evidence.table(head, rows)


def draw_differences(path, rows):
    """What MMoLRE is better by, with intervals."""
    titles = ("sentiment: MAE saved", "emotion: points of weighted F1")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for axes, title, which, scale in zip(panels, titles, (2, 3), (1, 100)):
            axes.axvline(0, color=INK, lw=1)
            for y, row in enumerate(reversed(rows)):
                mean, low, high = (scale * v for v in row[which])
                colour = OURS if low > 0 else GREY
                axes.plot(
                    [low, high], [y, y], color=colour, lw=5, alpha=0.5, solid_capstyle="round"
                )
                axes.plot(mean, y, "o", color=colour, ms=8)
            axes.set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
            axes.set_title(title, size=11)
            axes.spines["left"].set_visible(False)
            axes.xaxis.set_major_locator(plt.MaxNLocator(5))
            axes.margins(y=0.15)
        figure.suptitle(
            f"What {FIRST} is better by, 95 % intervals", x=0.01, ha="left", weight="bold"
        )
        figure.savefig(path)
        plt.close(figure)


def draw_gates(path, seeds):
    """Mean gate of each expert by modality, block and task; the first seed, since experts have no names."""
    shares, tasks = seeds[0], ("sentiment", "emotion")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(shares), 2, figsize=(8, 1.7 * len(shares) + 0.8), layout="constrained"
        )
        for row, (modality, blocks) in zip(panels, shares.items()):
            for number, (axes, gates) in enumerate(zip(row, blocks)):
                gates = np.array(gates)  # (tasks, E)
                image = axes.imshow(gates, cmap=WHITE_TO_BLUE, vmin=0, vmax=0.6, aspect="auto")
                shared = gates.shape[1] - len(tasks)
                names = [*map(str, range(1, shared + 1)), *("own" for _ in tasks)]
                axes.set_xticks(range(len(names)), names)
                axes.set_yticks(range(len(tasks)), tasks if number == 0 else [])
                axes.set_title(f"{modality}, block {number + 1}", size=11, pad=6)
                axes.spines[:].set_visible(False)
                for (y, x), value in np.ndenumerate(gates):
                    if value:
                        axes.text(
                            x, y, f"{value:.0%}", ha="center", va="center", size=9,
                            color="white" if value > 0.3 else INK,
                        )  # fmt: skip
        figure.colorbar(image, ax=panels, shrink=0.6, pad=0.02).outline.set_visible(False)
        figure.suptitle(
            "Which experts the tasks take: mean gates", x=0.01, ha="left", weight="bold"
        )
        figure.savefig(path)
        plt.close(figure)
