"""BranchLoRA's tables and pictures from the finished runs."""

import statistics
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from examples.common import evidence, figures
from examples.common.evidence import shown, table, verdict
from lora_moe.methods.branch_lora.continual import continual_metrics

METRICS = ("ACC", "MAA", "BWT")
COLOURS = {
    "lora": figures.GREY,
    "moelora": figures.LOOP,
    "shared A": "#CC79A7",
    "sparse": "#E69F00",
    "freezing": "#56B4E9",
    "BranchLoRA": figures.OURS,
}
NAMES = {
    "lora": "sequential LoRA",
    "moelora": "MoELoRA",
    "shared A": "+ shared A",
    "sparse": "+ sparse, by sequence",
    "freezing": "+ freezing",
    "BranchLoRA": "+ task routers = BranchLoRA",
    "no freezing": "BranchLoRA without freezing",
    "trunk held": "BranchLoRA, A held after task 1",
    "growing": "BranchLoRA, growing",
    "moelora at 3e-4": "MoELoRA at 3e-4",
    "moelora at 1e-3": "MoELoRA at 1e-3",
    "freezing at 1e-3": "+ freezing, at 1e-3",
}


def by_item(right):
    """{metric: (items,)}, whose means are ACC, MAA and BWT."""
    n = len(right)
    rows = [[np.asarray(row, dtype=float) for row in rows] for rows in right]
    maa = [sum(rows[i][j] / (i + 1) for i in range(j, n)) for j in range(n)]
    bwt = [rows[-1][j] - rows[j][j] for j in range(n - 1)]
    values = {"ACC": rows[-1], "MAA": maa, "BWT": bwt}
    return {metric: np.concatenate(parts) for metric, parts in values.items()}


def accuracy(run):
    """A_ij, the lower triangle."""
    return [[statistics.mean(row) for row in rows] for rows in run["right"]]


def markdown(data, runs, seeds, seconds):
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    parts = [
        "**After all tasks**, means over seeds, and each seed; points.",
        ladder(runs, arms, seeds),
        "**Differences**, item by item: mean and 95 % interval; points.",
        differences(runs, arms, seeds),
        "**Each task** as it was learned → after the last, mean over seeds; points.",
        by_task(data, runs, arms, seeds),
        "**Who knows the task**: BranchLoRA after the last task.",
        selection(data, runs, seeds),
        "**A training step**, first task; median and quartiles of turns on the same batch.",
        times(seconds),
    ]
    return "\n\n".join(parts)


def ladder(runs, arms, seeds):
    rows = []
    for arm in arms:
        each = [continual_metrics(accuracy(runs[arm, seed])) for seed in seeds]
        cells = []
        for values in zip(*each):
            single = ", ".join(f"{100 * v:.1f}" for v in values)
            cells.append(f"{100 * statistics.mean(values):.1f} ({single})")
        rows.append([NAMES[arm], *cells, f"{runs[arm, seeds[0]]['trained'][0]:,}"])
    return table(["arm", *METRICS, "trained at once"], rows)


def differences(runs, arms, seeds):
    steps = [(b, a) for a, b in pairwise(arms) if b in COLOURS]
    wanted = [*steps, ("BranchLoRA", "moelora"), ("BranchLoRA", "lora")]
    wanted += [("BranchLoRA", arm) for arm in arms if " at " in arm]
    wanted += [("freezing at 1e-3", "sparse")]  # at the same rate
    wanted += [(arm, "BranchLoRA") for arm in arms if arm not in COLOURS and " at " not in arm]
    rows = []
    for first, second in dict.fromkeys(wanted):
        if first not in arms or second not in arms:
            continue
        cells = []
        for metric in METRICS:
            pair = [
                [by_item(runs[arm, s]["right"])[metric] for s in seeds] for arm in (first, second)
            ]
            found = evidence.difference(*pair)
            cells.append(f"{shown(found)} {verdict(found)}")
        rows.append([f"{NAMES[first]}, less {NAMES[second]}", *cells])
    return table(["difference; is it above 0?", *METRICS], rows)


def by_task(data, runs, arms, seeds):
    rows = []
    for arm in arms:
        found = [accuracy(runs[arm, seed]) for seed in seeds]
        cells = []
        for j in range(len(data.tasks)):
            learned = statistics.mean(a[j][j] for a in found)
            last = statistics.mean(a[-1][j] for a in found)
            cells.append(f"{100 * learned:.0f} → {100 * last:.0f}")
        rows.append([NAMES[arm], *cells])
    majority = [f"{100 * task.majority(data.split, data.items):.0f}" for task in data.tasks]
    return table(["arm", *(t.name for t in data.tasks)], [*rows, ["majority", *majority]])


def selection(data, runs, seeds):
    found = [runs["BranchLoRA", seed] for seed in seeds]
    names = [*(task.name for task in data.tasks), "all"]

    def row(name, per_run):  # (seeds, tasks, items)
        values = np.asarray(per_run, dtype=float)
        cells = [f"{100 * v:.1f}" for v in values.mean((0, 2))]
        mean, low, high = evidence.interval(values.reshape(len(values), -1))
        return [name, *cells, f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]

    rows = [
        row("selector is right, %", [run["selected"][-1] for run in found]),
        row("answer is right, %", [run["right"][-1] for run in found]),
        row("... had the selector been right, %", [run["oracle"] for run in found]),
    ]
    frozen = [len(layer) for run in found for layer in run["frozen"]]
    text = table(["", *names], rows)
    return f"{text}\n\nFrozen branches a layer at the end: {statistics.mean(frozen):.1f}."


def times(seconds):
    rows = []
    for name, values in seconds.items():
        low, middle, high = (1000 * v for v in np.quantile(values, (0.25, 0.5, 0.75)))
        ratio = statistics.median(a / b for a, b in zip(values, seconds["moelora"]))
        rows.append([name, f"{middle:.0f} [{low:.0f}, {high:.0f}]", f"{ratio:.2f}"])
    return table(["arm", "ms a step", "of MoELoRA's"], rows)


def draw(out, data, runs, seeds):
    draw_course(out / "course.png", data, runs, seeds)
    draw_matrices(out / "forgetting.png", data, runs, seeds)


def draw_course(path, data, runs, seeds):
    """Mean accuracy on the tasks so far, after each task."""
    with plt.rc_context(figures.STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
        at = range(1, len(data.tasks) + 1)
        for arm, colour in COLOURS.items():
            if (arm, seeds[0]) not in runs:
                continue
            each = [[statistics.mean(r) for r in accuracy(runs[arm, s])] for s in seeds]
            mean = np.mean(each, 0)
            width = 3.2 if arm == "BranchLoRA" else 1.8
            axes.fill_between(at, np.min(each, 0), np.max(each, 0), color=colour, alpha=0.12, lw=0)
            axes.plot(at, mean, "o-", color=colour, lw=width, ms=width + 2, label=NAMES[arm])
        axes.set_xticks(at, [f"{i}\n{task.name}" for i, task in zip(at, data.tasks)])
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(ylabel="accuracy on the tasks so far", xlabel="after learning task")
        axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        axes.set_title("Tasks in a row, one after the other; band: the seeds", pad=44)
        figures.save(figure, path)


def draw_matrices(path, data, runs, seeds):
    """A_ij of MoELoRA and of BranchLoRA: what was known after task i about task j."""
    with plt.rc_context(figures.STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(8, 4.4), sharey=True, layout="constrained")
        names = [task.name for task in data.tasks]
        for axes, arm in zip(panels, ("moelora", "BranchLoRA")):
            n = len(names)
            values = np.full((n, n), np.nan)
            for i in range(n):
                for j in range(i + 1):
                    values[i, j] = np.mean([accuracy(runs[arm, s])[i][j] for s in seeds])
                    shade = "white" if values[i, j] > 0.6 else figures.INK
                    axes.text(
                        j, i, f"{100 * values[i, j]:.0f}", ha="center", va="center", color=shade
                    )
            axes.imshow(values, cmap=figures.WHITE_TO_BLUE, vmin=0, vmax=1, aspect="auto")
            axes.set_title(NAMES[arm].split(" = ")[-1], size=11, pad=8)
            axes.set_xticks(range(n), names, rotation=40, ha="right")
            axes.set_yticks(range(n), names)
            axes.spines[:].set_visible(False)
        panels[0].set_ylabel("after learning")
        figure.suptitle("Right answers in each task, %", x=0.01, ha="left", weight="bold", size=13)
        figures.save(figure, path)
