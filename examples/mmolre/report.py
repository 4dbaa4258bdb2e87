"""What the runs of examples/mmolre/experiment.py say: tables in Markdown, and two pictures."""

import statistics

from benchmarks import timing
from examples.common import evidence
from examples.mmolre import data as mmolre_data
from examples.mmolre.comparisons import FIRST, FULL, LOW, agreement, claims, compared, full_rank
from examples.mmolre.pictures import draw_differences, draw_gates

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
