"""Forward and backward time of one block: low-rank and full-rank experts, ours and plain PyTorch."""

import copy
import statistics
from functools import partial

import torch

from benchmarks import timing
from examples.common import evidence
from examples.mmolre.arms import SHARED, parameters
from examples.mmolre.plain import plain
from lora_moe.methods.mmolre import UniTSE


def step_times(width, rank, items, length, turns):
    """{block: (parameters, seconds of each turn)} of interleaved forwards and backwards."""
    x = torch.randn(items, length, width)
    contenders, sizes = {}, {}
    for kind, r in (("low-rank", rank), ("full-rank", width)):
        block = UniTSE(width, (r,) * SHARED, (r,) * 2)
        same = plain(copy.deepcopy(block))
        torch.testing.assert_close(same(x), block(x), rtol=1e-3, atol=1e-4)
        for how, module in (("ours", block), ("plain PyTorch", same)):
            contenders[f"{kind}, {how}"] = partial(_step, module, x)
            sizes[f"{kind}, {how}"] = parameters(module)
    seconds = timing.interleave(contenders, turns, laggard=float("inf"))
    return {name: (sizes[name], seconds[name]) for name in contenders}


def _step(module, x):
    module.zero_grad()
    module(x.detach().requires_grad_()).sum().backward()


def report(width, rank, items, length, turns):
    """A table of medians of interleaved turns."""
    times = step_times(width, rank, items, length, turns)
    first = times["low-rank, ours"][1]
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
