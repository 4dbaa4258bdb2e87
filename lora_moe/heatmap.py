"""Plots expert load over a training run: one heat map per expert, layers by time.

Layers of one kind (such as q_proj of every block) are grouped, the first block on top.  Color is the expert's
load divided by its layer's mean load, on a logarithmic scale: white is 1, balanced; red is overloaded; blue
is underloaded, and the darkest blue is dead.
"""

from __future__ import annotations

import os
import re
from itertools import groupby
from pathlib import Path

import numpy as np

from .history import History

MAX_PANELS = 32
COLUMNS = 8
MAX_LABELS = 32
FLOOR = 1 / 16  # of the color scale; dead experts are below it


def draw(history: History, path: str | os.PathLike) -> Path:
    """Write a PNG of the history.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the history is empty.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: neither a display nor global state
    except ImportError as error:
        raise ImportError("plotting requires matplotlib; run pip install matplotlib") from error
    if not history.steps:
        raise ValueError("history: expected at least one step, got none")
    names = sorted(history.experts, key=_kind)  # stable: keeps the model's order within a kind
    loads = _relative_loads(history, names)  # (layers, steps, experts)
    experts = _shown(loads)
    columns = min(COLUMNS, len(experts))
    rows = -(-len(experts) // columns)
    height = min(max(2.0, 0.16 * len(history.experts)), 7.0 if rows == 1 else 3.2)
    figure = Figure(
        (3.2 + 1.5 * columns, 2.4 + rows * (height + 0.45)), layout="constrained", dpi=130
    )
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[height] * rows + [1.4])
    _title(figure, names, loads, experts)
    _heat_maps(figure, grid, history, names, loads, experts, columns)
    _course(figure.add_subplot(grid[rows, :]), history, loads)
    figure.savefig(path)
    return Path(path)


def _kind(name):
    """The module path without block numbers."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", "", name)


def _relative_loads(history, names):
    """(layers, steps, experts) load divided by the layer's mean; NaN if there is no such expert or step."""
    widest = max(history.experts.values())
    loads = np.full((len(names), len(history.steps), widest), np.nan)
    for i, name in enumerate(names):
        for t, row in enumerate(history.load_of[name]):
            loads[i, t, : len(row)] = np.asarray(row) * len(row)
    return loads


def _shown(loads):
    """All experts, or the MAX_PANELS with the highest peak load."""
    count = loads.shape[2]
    if count <= MAX_PANELS:
        return list(range(count))
    peak = np.nanmax(np.nanmean(loads, axis=0), axis=0)
    return sorted(np.argsort(-peak)[:MAX_PANELS].tolist())


def _title(figure, names, loads, experts):
    worst = _worst(loads)[:, -1]
    shown = "" if len(experts) == loads.shape[2] else f" ({len(experts)} of {loads.shape[2]} shown)"
    figure.suptitle(
        f"Load of each expert{shown} over training: white is balanced, red overloaded, blue starved\n"
        f"at the end the worst layer is {_short(names)[worst.argmax()]},"
        f" its busiest expert at {worst.max():.1f} times the mean",
        fontsize=10,
    )


def _heat_maps(figure, grid, history, names, loads, experts, columns):
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    colors = colormaps["RdBu_r"].with_extremes(under="#021026", bad="#cccccc")
    norm = LogNorm(FLOOR, 1 / FLOOR)
    axes = []
    for i, e in enumerate(experts):
        row, column = divmod(i, columns)
        axis = figure.add_subplot(grid[row, column])
        values = np.where(loads[:, :, e] == 0, FLOOR / 10, loads[:, :, e])
        image = axis.imshow(
            np.ma.masked_invalid(values), aspect="auto", cmap=colors, norm=norm,
            interpolation="nearest",
        )  # fmt: skip
        axis.set_title(f"expert {e}", fontsize=9)
        _time_axis(axis, history.steps)
        _layer_axis(axis, names, labeled=column == 0)
        axes.append(axis)
    bar = figure.colorbar(image, ax=axes, extend="min", fraction=0.03, pad=0.01)
    bar.set_ticks([1 / 16, 1 / 4, 1, 4, 16], labels=["1/16", "1/4", "1", "4", "16"])
    bar.minorticks_off()
    bar.set_label("load over mean (darkest: dead)", fontsize=8)


def _time_axis(axis, steps):
    marks = sorted({0, len(steps) // 2, len(steps) - 1})
    axis.set_xticks(marks, [steps[t] for t in marks], fontsize=7)


def _layer_axis(axis, names, labeled):
    """Label each layer if there is room, else each kind, with lines between kinds."""
    labels = _short(names)
    at = list(range(len(names)))
    if len(names) > MAX_LABELS:
        bands = [
            [i for i, _ in band] for _, band in groupby(enumerate(names), lambda n: _kind(n[1]))
        ]
        at = [(band[0] + band[-1]) / 2 for band in bands]
        labels = [_kind(_short(names)[band[0]]).strip(".") for band in bands]
        if labeled:
            axis.set_ylabel("layers, within each kind the first on top", fontsize=8)
        for band in bands[1:]:
            axis.axhline(band[0] - 0.5, color="#555555", linewidth=0.6)
    if len(labels) > MAX_LABELS or not labeled:
        at, labels = [], []
    axis.set_yticks(at, labels, fontsize=7)


def _short(names):
    """Module paths without their common prefix."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(p[: shared + 1] == parts[0][: shared + 1] for p in parts):
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def _worst(loads):
    """(layers, steps) load of the busiest expert, divided by the mean."""
    return np.nan_to_num(np.nanmax(np.where(np.isnan(loads), -np.inf, loads), axis=2), neginf=0.0)


def _course(axis, history, loads):
    worst = _worst(loads)
    axis.plot(history.steps, worst.max(0), color="#b2182b", label="worst layer")
    axis.plot(history.steps, np.median(worst, 0), color="#333333", label="median layer")
    axis.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    axis.set_ylim(0, 1.3 * worst.max())
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel("max over mean", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, frameon=False, loc="upper left", ncols=2)
