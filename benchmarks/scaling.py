"""The cost of a layer as tokens, picked experts and experts grow; router and dense gradients shown
separately.

Expected: linear in T and K; flat in E except for two things that must grow: the router's product x W^T
and, in the backward, writing dA and dB, which are dense by contract, including experts that no token picked.
Results are written to memory that the process already has: mapping fresh pages is not measured.
"""

import statistics
from dataclasses import replace

import torch

from benchmarks import contenders as entry
from benchmarks import machine, timing
from benchmarks.shapes import Shape, sample
from benchmarks.suite import PASSES, each
from lora_moe import functional

BASE = Shape(2048, 1024, 1024, 8, 16)
AXES = {"T": (1024, 2048, 4096, 8192), "K": (1, 2, 4, 8), "E": (8, 16, 32, 64, 128)}
QUICK = Shape(32, 64, 48, 4, 4), {"T": (16, 32), "K": (1, 2), "E": (4, 8)}


def run(options, result, progress=lambda text: None, keep=lambda result: None):
    """result["scaling"]: one row per axis, value, dtype and pass, with the parts' seconds turn by turn.

    `keep` and interrupts work as in suite.run.
    """
    base, axes = QUICK if options.quick else (BASE, AXES)
    if not options.quick:
        machine.keep_memory()
    rows = result["scaling"] = []

    def add(axis, shape, dtype, name):
        seconds = measure(shape, dtype, name == PASSES[1], options)
        where = {"axis": axis, "value": getattr(shape, axis), "base": str(base)}
        dtype_name = str(dtype).removeprefix("torch.")
        rows.append(where | {"dtype": dtype_name, "pass": name, "seconds": seconds})
        progress(f"    {timing.brief(seconds)}")
        keep(result)

    steps = [
        (axis, replace(base, **{axis: value}), dtype, name)
        for axis, values in axes.items()
        for value in values
        for dtype in options.dtypes
        for name in options.passes
    ]
    each(steps, add, result, progress)


def measure(shape, dtype, backward, options):
    """Seconds in total, for the router alone, and for writing dA and dB alone."""
    inputs = sample(shape, dtype, options.device)
    copies = entry.copies_for(shape, inputs, options.cache)
    states = entry.states(entry.peers.rows, shape, inputs, backward, copies)
    x, router, a, b = states[0]
    dy = inputs.dy if backward else None
    dweights = torch.ones(shape.T, shape.K, device=x.device) if backward else None

    def route(x, router, top_k):
        return functional.router_topk(x, router, top_k, renormalize=top_k > 1).weights

    parts = {
        "all": entry.prepare(entry.ours, states, shape.K, dy),
        "router": entry.prepare(route, [(x, router)], shape.K, dweights),
    }
    if backward:
        parts["dA and dB"] = lambda: [torch.empty_like(t).fill_(0) for t in (a, b)]
    return timing.interleave(parts, options.repeats, options.clock, laggard=float("inf"))


def rest(row):
    """Median seconds without the parts that must grow with E."""
    medians = {name: statistics.median(s) for name, s in row["seconds"].items()}
    return 2 * medians["all"] - sum(medians.values())


def growth(row, first):
    """The rest relative to the first row's, per token or picked expert if that is the axis."""
    factor = row["value"] / first["value"] if row["axis"] != "E" else 1.0
    return rest(row) / rest(first) / factor
