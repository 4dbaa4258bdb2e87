"""BranchLoRA's plots: final accuracy and forgetting, accuracy after each task, and accuracy per task."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from examples.branch_lora.arms import MAIN
from examples.branch_lora.report import NAMES, Found
from examples.common import figures

COLORS = {
    "lora": figures.GREY,
    "EWC": "#CC79A7",
    "LwF": "#E69F00",
    "LoRA per task": "#009E73",
    "moelora": figures.LOOP,
    "BranchLoRA": figures.OURS,
    "joint": figures.INK,
}
LABELS = {"ACC": "final accuracy (ACC)", "BWT": "forgetting (BWT)"}


def draw(out, data, runs, seeds):
    found = Found(data, runs, seeds)
    draw_orders(out / "orders.png", found)
    draw_course(out / "course.png", found)
    draw_matrices(out / "forgetting.png", found)


def draw_orders(path, found):
    """Plots ACC and BWT of the main arms in each order: a dot per seed, a bar at the mean."""
    with plt.rc_context(figures.STYLE):
        figure, panels = plt.subplots(2, 1, figsize=(8, 6.4), sharex=True, layout="constrained")
        for axes, (metric, label) in zip(panels, LABELS.items()):
            for k, arm in enumerate(MAIN):
                means = found.items(arm, metric).mean(2)  # (orders, seeds)
                at = np.arange(len(means)) + (k - (len(MAIN) - 1) / 2) * 0.13
                axes.plot(at, means, "o", color=COLORS[arm], ms=3.5, alpha=0.55, mew=0)
                axes.hlines(
                    means.mean(1), at - 0.055, at + 0.055, COLORS[arm], lw=4, label=NAMES[arm]
                )
            axes.axhline(0, color="#DADCE0", lw=1, zorder=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.set_ylabel(label)
        joint = found.items("joint", "ACC").mean()
        panels[0].axhline(joint, color=COLORS["joint"], lw=1.2, ls="--", label="joint training")
        panels[0].legend(
            frameon=False, fontsize=9, ncols=4, loc="lower left", bbox_to_anchor=(0, 1)
        )
        panels[0].set_title("Final accuracy and forgetting", pad=44)
        panels[1].set_xticks(range(len(found.orders)), [f"{name} order" for name in found.orders])
        figures.save(figure, path)


def course_of(found, arm):
    """Mean accuracy on the tasks so far, after each task: (orders, seeds, tasks)."""
    each = [
        [np.mean([np.mean(row) for row in rows]) for rows in run["right"]]
        for _, run in found.of(arm)
    ]
    return np.reshape(each, (len(found.orders), len(found.seeds), -1))


def draw_course(path, found):
    """Plots accuracy over the tasks for the main arms; the band spans the orders."""
    with plt.rc_context(figures.STYLE):
        figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
        at = range(1, len(found.data.tasks) + 1)
        for arm in MAIN:
            each = course_of(found, arm).mean(1)
            width, color = 3.2 if arm == "BranchLoRA" else 1.8, COLORS[arm]
            axes.fill_between(at, each.min(0), each.max(0), color=color, alpha=0.1, lw=0)
            axes.plot(at, each.mean(0), "o-", color=color, lw=width, ms=width + 2, label=NAMES[arm])
        axes.set_xticks(at)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(ylabel="accuracy on the tasks so far", xlabel="tasks learned")
        axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        axes.set_title("Accuracy after each task; mean and range of three orders", pad=44)
        figures.save(figure, path)


def draw_matrices(path, found):
    """Plots A_ij, the accuracy on task j after task i, of MoELoRA and BranchLoRA in the first order."""
    order = next(iter(found.orders))
    names = [found.data.tasks[t].name for t in found.orders[order]]
    with plt.rc_context(figures.STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(8, 4.4), sharey=True, layout="constrained")
        for axes, arm in zip(panels, ("moelora", "BranchLoRA")):
            runs = [found.runs[order][arm, seed]["right"] for seed in found.seeds]
            values = np.full((len(names), len(names)), np.nan)
            for i, j in zip(*np.tril_indices(len(names))):
                values[i, j] = np.mean([right[i][j] for right in runs])
                shade = "white" if values[i, j] > 0.6 else figures.INK
                text = f"{100 * values[i, j]:.0f}"
                axes.text(j, i, text, ha="center", va="center", color=shade)
            axes.imshow(values, cmap=figures.WHITE_TO_BLUE, vmin=0, vmax=1, aspect="auto")
            axes.set_title(NAMES[arm], size=11, pad=8)
            axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
            axes.set_yticks(range(len(names)), names)
            axes.spines[:].set_visible(False)
        panels[0].set_ylabel("after learning")
        figure.suptitle("Accuracy on each task, %", x=0.01, ha="left", weight="bold", size=13)
        figures.save(figure, path)
