"""The demos' plots. The colors are safe for color-blind readers; labels are placed next to the data."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files, needs no screen

import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import PercentFormatter

OURS, LOOP, GREY, INK = "#0072B2", "#D55E00", "#9AA0A6", "#202124"
WHITE_TO_BLUE = LinearSegmentedColormap.from_list("load", ["white", "#9CC9E8", OURS, "#00243B"])
STYLE = {
    "figure.dpi": 160,
    "figure.facecolor": "white",
    "font.size": 10.5,
    "text.color": INK,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
    "axes.labelcolor": "#5F6368",
    "axes.edgecolor": "#DADCE0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#5F6368",
    "ytick.color": "#5F6368",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def draw_accuracy(path, rows):
    """Plots accuracy before and after training; rows: (task, untuned, tuned, majority), as shares."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 0.95 * len(rows) + 1.3), layout="constrained")
        for y, (task, before, after, majority) in enumerate(reversed(rows)):
            axes.plot([0, 1], [y, y], color="#F1F3F4", lw=10, solid_capstyle="round", zorder=0)
            axes.annotate("", (after, y), (before, y), zorder=1, arrowprops=_arrow())
            grey = axes.plot(before, y, "o", ms=11, color=GREY)
            blue = axes.plot(after, y, "o", ms=13, color=OURS)
            line = axes.plot(majority, y, "|", ms=22, mew=2, color=INK)
            axes.text(0, y + 0.31, task, weight="bold", va="center")
            axes.text(before, y - 0.32, f"{before:.0%}", color="#5F6368", ha="center", va="center")
            axes.text(
                after, y - 0.32, f"{after:.0%}", color=OURS, weight="bold", ha="center", va="center"
            )
        axes.legend(
            [*grey, *line, *blue],
            ["untuned", "majority class", "with a mixture of LoRA experts"],
            loc="lower left",
            bbox_to_anchor=(-0.01, 0.97),
            ncols=3,
            frameon=False,
            markerscale=0.75,
            handletextpad=0.1,
            columnspacing=1.2,
        )
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(rows) - 0.3), yticks=[])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_title("Held-out accuracy, before and after training", pad=34)
        return save(figure, path)


def _arrow():
    return {"arrowstyle": "-", "color": OURS, "lw": 3, "alpha": 0.45, "shrinkA": 6, "shrinkB": 6}


def draw_loss(path, ours, loop, flips):
    """Plots our loss per step and the loop's (fewer steps); flips: share of routing decisions that differ."""
    with plt.rc_context(STYLE):
        figure, (top, low) = plt.subplots(
            2, 1, figsize=(8, 4.9), height_ratios=(3, 1), sharex=True, layout="constrained"
        )
        steps = range(1, len(ours) + 1)
        top.plot(steps, ours, color=OURS, lw=5, alpha=0.35, solid_capstyle="round")
        top.plot(steps[: len(loop)], loop, color=LOOP, lw=1.6)
        top.annotate(
            "ours, one pass over x",
            (steps[-1], ours[-1]),
            (0, 14),
            textcoords="offset points",
            color=OURS,
            weight="bold",
            ha="right",
        )
        top.annotate(
            f"loop over experts\n(first {len(loop)} steps)",
            (len(loop) * 0.6, loop[int(len(loop) * 0.6) - 1]),
            (len(loop) * 0.75, max(ours) * 0.55),
            color=LOOP,
            weight="bold",
            arrowprops={"arrowstyle": "-", "color": LOOP, "lw": 1, "shrinkB": 4},
        )
        top.set(ylim=(0, None), ylabel="loss on the answers")
        top.set_title("The loss curves match, despite different rounding")
        low.bar(steps[: len(flips)], flips, color=GREY, width=0.7)
        low.yaxis.set_major_formatter(PercentFormatter(1, decimals=_decimals(max(flips))))
        low.set(ylabel="routing\nthat differs", xlabel="training step", xlim=(0.4, len(ours) + 0.6))
        return save(figure, path)


def _decimals(largest):
    return 0 if largest > 0.05 else 2 if largest > 5e-4 else 3


def draw_load(path, load, tasks, module):
    """Plots load (layers, tasks, E), the share of each task's slots that an expert received."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(tasks), figsize=(8, 5.6), sharey=True, layout="constrained"
        )
        for number, (axes, task) in enumerate(zip(panels, tasks)):
            image = axes.imshow(
                load[:, number], cmap=WHITE_TO_BLUE, vmin=0, vmax=float(load.max()), aspect="auto"
            )
            axes.set_title(task, size=11, pad=8)
            axes.set_xticks(range(load.shape[2]), range(1, load.shape[2] + 1))
            axes.spines[:].set_visible(False)
        panels[0].set(ylabel="layer", yticks=range(0, len(load), 5))
        figure.supxlabel("expert", size=10.5, color="#5F6368")
        bar = figure.colorbar(image, ax=panels, shrink=0.5, pad=0.02)
        even, most = 1 / load.shape[2], float(load.max())
        bar.set_ticks([0, even, most], labels=["0%", f"{even:.1%}, even", f"{most:.0%}"])
        bar.outline.set_visible(False)
        figure.suptitle(
            f"Load of the experts of {module}, by layer and task",
            x=0.01,
            ha="left",
            weight="bold",
            size=13,
        )
        return save(figure, path)


def draw_cost(path, panels):
    """Plots bars; panels: (title, {contender: value}, formatter of a value); the first contender is ours."""
    with plt.rc_context(STYLE):
        figure, columns = plt.subplots(
            1, len(panels), figsize=(8, 2.9), sharey=True, layout="constrained"
        )
        for axes, (title, values, text) in zip(columns, panels):
            names = list(values)[::-1]
            colors = [GREY] * (len(names) - 1) + [OURS]
            axes.barh(names, [values[n] for n in names], color=colors, height=0.62)
            for y, name in enumerate(names):
                label = axes.text(values[name], y, " " + text(values[name]), va="center")
            label.set_weight("bold")  # the last drawn is ours
            axes.set_title(title, size=11, pad=6)
            axes.set(xlim=(0, 1.32 * max(values.values())), xticks=[])
            axes.spines[["left", "bottom"]].set_visible(False)
        figure.suptitle("What one training step costs", x=0.01, ha="left", weight="bold", size=13)
        return save(figure, path)


def save(figure, path):
    figure.savefig(path)
    plt.close(figure)
    return Path(path).name
