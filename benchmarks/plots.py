"""Plots of a run: the gain over the best peer for every shape, and how the cost grows."""

import statistics

import matplotlib.pyplot as plt

from benchmarks import report, scaling
from examples.common.figures import GREY, LOOP, OURS, STYLE

AXIS_NAMES = {"T": "tokens", "K": "picked experts per token", "E": "experts"}


def draw_gains(path, result):
    """One dot per shape: our speedup over the best peer; the bar spans the quartiles."""
    groups = {}
    for row in result["rows"]:
        verdict = report.judge(row, result["limits"])
        if verdict:
            groups.setdefault(report.heading(row), []).append((row["text"], verdict.gain))
    lines, longest = -(-len(groups) // 2), max(map(len, groups.values()))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            *(lines, 2), figsize=(9, lines * (1 + 0.24 * longest)), squeeze=False, sharex=True,
            layout="constrained",
        )  # fmt: skip
        for axes in grid.flat[len(groups) :]:
            axes.set_visible(False)
        for axes, (heading, gains) in zip(grid.flat, groups.items()):
            for y, (_, gain) in enumerate(gains):
                color = OURS if gain.median >= 1 else LOOP
                axes.plot([gain.low, gain.high], [y, y], color=color, lw=2)
                axes.plot(gain.median, y, "o", color=color, ms=5)
            axes.axvline(1, color=GREY, lw=1, zorder=0)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}x")
            axes.set_yticks(range(len(gains)), [name for name, _ in gains], size=7)
            axes.set_ylim(len(gains) - 0.4, -0.6)
            axes.set_title(heading, size=8.5, pad=6)
        figure.suptitle("Best peer's time over ours", x=0.01, ha="left", weight="bold", size=12)
        figure.savefig(path)
        plt.close(figure)


def draw_scaling(path, rows):
    """One panel per axis and pass: the total, the router, writing dense gradients, the rest."""
    dtype = rows[0]["dtype"]
    rows = [row for row in rows if row["dtype"] == dtype]
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    axes_of = list(dict.fromkeys(row["axis"] for row in rows))
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(passes),
            len(axes_of),
            figsize=(9, 2.9 * len(passes)),
            squeeze=False,
            layout="constrained",
        )
        for line, name in zip(grid, passes):
            for panel, axis in zip(line, axes_of):
                _panel(panel, [r for r in rows if (r["pass"], r["axis"]) == (name, axis)])
                panel.set(xlabel=AXIS_NAMES[axis], ylim=(0, None))
                panel.tick_params(axis="x", labelsize=7)
            line[0].set_ylabel(f"{name}, ms")
        grid[-1, 0].legend(frameon=False, fontsize=8)
        title = f"Cost of a layer's experts, {dtype}; sizes not on the axis: {rows[0]['base']}"
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
        figure.savefig(path)
        plt.close(figure)


def _panel(panel, rows):
    rows = sorted(rows, key=lambda row: row["value"])
    at = [row["value"] for row in rows]
    for name, color in (("all", OURS), ("router", GREY), ("dA and dB", LOOP)):
        if name in rows[0]["seconds"]:
            values = [1e3 * statistics.median(row["seconds"][name]) for row in rows]
            panel.plot(at, values, "o-", color=color, label=name)
    panel.set_xticks(at)
    panel.plot(at, [1e3 * scaling.rest(row) for row in rows], "--", color=OURS, label="the rest")
