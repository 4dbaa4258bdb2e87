"""What the runs of examples/mmolre.py say: tables in Markdown, and two pictures."""

import statistics

import matplotlib

matplotlib.use("Agg")  # writes files, needs no screen

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import timing
from examples import evidence, mmolre_data
from examples.figures import GREY, INK, OURS, STYLE, WHITE_TO_BLUE

FIRST = "MMoLRE"
COMPARED = {  # (sentiment's, emotion's) other arm, and what the difference says
    "hard sharing": "shared and task experts beat hard sharing at equal parameters",
    "no task experts": "task-specific experts beat as many more shared ones",
    "text alone": "both modalities matter: more than the text",
    "image alone": "both modalities matter: more than the image",
    "one task alone": "two tasks in one model beat a model for each",
}
MARGINS = {"error": 0.05, "right": 0.01}  # similar quality: at most this much worse
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
    seeds = args.seeds
    arms = list(dict.fromkeys(arm for arm, _ in found))
    rows = compared(found, seeds)
    parts = [
        described(sizes, data),
        quality(found, arms, seeds, data[2]),
        each_seed(found, arms, seeds),
        claims(rows),
        full_rank(found, seeds),
        steps(times, sizes.timed),
        setting,
    ]
    text = "\n\n".join(parts)
    (args.out / "results.md").write_text(text + "\n")
    print(text)
    draw_differences(args.out / "differences.png", rows)
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
    head = ["arm", *(f"MAE, seed {s}" for s in seeds), *(f"labels right, seed {s}" for s in seeds)]
    rows = []
    for arm in arms:
        runs = [found[arm, seed] for seed in seeds]
        errors = [f"{np.mean(r['error']):.3f}" if "error" in r else "" for r in runs]
        right = [f"{np.mean(r['right']):.1%}" if "right" in r else "" for r in runs]
        rows.append([arm, *errors, *right])
    return evidence.table(head, rows)


def compared(found, seeds):
    """[(other arm, claim, sentiment's difference, emotion's)], intervals of what ours is better by."""
    rows = []
    for arm, claim in COMPARED.items():
        one = arm == "one task alone"
        error, right = ("sentiment alone", "emotion alone") if one else (arm, arm)
        rows.append(
            (
                arm,
                claim,
                evidence.difference(
                    _of(found, error, seeds, "error"), _of(found, FIRST, seeds, "error")
                ),
                evidence.difference(
                    _of(found, FIRST, seeds, "right"), _of(found, right, seeds, "right")
                ),
            )
        )
    return rows


def _of(found, arm, seeds, name):
    return [found[arm, seed][name] for seed in seeds]


def claims(rows):
    head = ["claim", "sentiment: MAE saved", "shown", "emotion: points of labels right", "shown"]
    return evidence.table(
        head,
        [
            [
                claim,
                evidence.shown(error, 1, 3),
                evidence.verdict(error),
                evidence.shown(right, 100, 2),
                evidence.verdict(right),
            ]
            for _, claim, error, right in rows
        ],
    )


def full_rank(found, seeds):
    """Low-rank experts against full-rank ones: similar quality for fewer parameters and less time?"""
    arm = "full-rank experts"
    ours, full = (
        [statistics.median(found[a, s][k] for s in seeds) for k in ("parameters", "trained")]
        for a in (FIRST, arm)
    )
    error = evidence.difference(_of(found, FIRST, seeds, "error"), _of(found, arm, seeds, "error"))
    right = evidence.difference(_of(found, arm, seeds, "right"), _of(found, FIRST, seeds, "right"))
    rows = [
        ["parameters of the model", f"{ours[0]:,} against {full[0]:,}", _holds(ours[0] < full[0])],
        ["CPU seconds to train", f"{ours[1]:.0f} against {full[1]:.0f}", _holds(ours[1] < full[1])],
        [
            f"MAE worse by at most {MARGINS['error']}",
            evidence.shown(error, 1, 3),
            _holds(error[2] <= MARGINS["error"]),
        ],
        [
            f"labels right fewer by at most {100 * MARGINS['right']:.0f} point",
            evidence.shown(right, 100, 2),
            _holds(right[2] <= MARGINS["right"]),
        ],
    ]
    return evidence.table(["low-rank against full-rank experts", "measured", "holds"], rows)


def _holds(holds):
    return "yes" if holds else "**not shown**"


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
    titles = ("sentiment: MAE saved", "emotion: points of labels right")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
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


def sources():
    return "\n".join(f"- {line}" for line in mmolre_data.SOURCES)
