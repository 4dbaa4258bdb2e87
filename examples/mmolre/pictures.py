"""The plot of docs/mmolre.md."""

import matplotlib

matplotlib.use("Agg")  # writes files, needs no screen

import matplotlib.pyplot as plt

from examples.common.figures import GREY, INK, OURS, STYLE, save


def draw_gains(path, rows):
    """Plots rows of (task, interval of its gradient's cosine with the rest, interval of the loss saved)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        axes.axhline(0, color=INK, lw=1)
        axes.axvline(0, color="#DADCE0", lw=1, zorder=0)
        for task, (x, *xs), gain in rows:
            y, *ys = (100 * value for value in gain)
            color = OURS if ys[0] > 0 else GREY
            axes.plot([x, x], ys, color=color, lw=5, alpha=0.5, solid_capstyle="round")
            axes.plot(xs, [y, y], color=color, lw=1)
            axes.plot(x, y, "o", color=color, ms=9)
            axes.annotate(task, (x, y), (9, 7), textcoords="offset points", weight="bold")
        axes.margins(0.18, 0.1)
        axes.set(
            xlabel="cosine of the task's gradient with the other tasks', under hard sharing",
            ylabel="points of loss saved by MMoLRE",
        )
        axes.set_title("MMoLRE against hard sharing, 95 % intervals")
        return save(figure, path)
