"""Pictures of a run: the gain over the best peer for every shape, and how the cost grows."""

import statistics

import matplotlib.pyplot as plt

from benchmarks import report, scaling
from examples.figures import GREY, LOOP, OURS, STYLE

AXIS_NAMES = {"T": "tokens", "K": "picked experts a token", "E": "experts"}


def draw_gains(path, result):
    """A dot a shape: how many times ours is as fast as the best peer; a bar: quartiles."""
    groups = {}
    for row in result["rows"]:
        judged = report.judge(row, result["limits"])
        if judged:
            groups.setdefault((row["pass"], row["dtype"], row["clock"]), []).append((row, judged))
    with plt.rc_context(STYLE):
        height = 1.2 + 0.26 * max(map(len, groups.values()))
        figure, columns = plt.subplots(
            1,
            len(groups),
            figsize=(3.2 + 2.6 * len(groups), height),
            squeeze=False,
            sharey=len({len(g) for g in groups.values()}) == 1,
            layout="constrained",
        )
        for axes, (group, judged) in zip(columns[0], groups.items()):
            for y, (_, verdict) in enumerate(reversed(judged)):
                gain = verdict.gain
                colour = OURS if gain.median >= 1 else LOOP
                axes.plot([gain.low, gain.high], [y, y], color=colour, lw=2)
                axes.plot(gain.median, y, "o", color=colour)
            axes.set_yticks(range(len(judged)), [row["text"] for row, _ in reversed(judged)])
            axes.axvline(1, color=GREY, lw=1)
            axes.set(xscale="log", xlabel="best peer's time / ours")
            axes.set_title(", ".join(group[:2]), size=10)
        figure.savefig(path)
        plt.close(figure)


def draw_scaling(path, rows):
    """A panel an axis and pass: all of it, the router, the writing of dense gradients, the rest."""
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
            line[0].set_ylabel(f"{name}, ms")
        grid[0, 0].legend(frameon=False, fontsize=8)
        figure.suptitle(f"{rows[0]['dtype']}; unless on the axis: {scaling.BASE}", size=10)
        figure.savefig(path)
        plt.close(figure)


def _panel(panel, rows):
    at = [row["value"] for row in rows]
    for name, colour in (("all", OURS), ("router", GREY), ("dA and dB", LOOP)):
        if name in rows[0]["seconds"]:
            values = [1e3 * statistics.median(row["seconds"][name]) for row in rows]
            panel.plot(at, values, "o-", color=colour, label=name)
    panel.plot(at, [1e3 * scaling.rest(row) for row in rows], "--", color=OURS, label="the rest")
