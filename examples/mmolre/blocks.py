"""Time of one block's forward and backward: low-rank and full-rank experts, ours and plain PyTorch."""

import statistics
from functools import partial

import torch
from torch import nn

from benchmarks import timing
from examples.common import evidence
from examples.mmolre.arms import SHARED, parameters
from lora_moe.methods.mmolre import UniTSE


class Plain(nn.Module):
    """The first block's formula in plain PyTorch: a pair of Conv1d an expert, one after the other."""

    def __init__(self, block):
        super().__init__()
        self.tasks, self.shared = block.tasks, block.shared
        self.router = nn.Linear(block.width, len(block.router_weight), bias=False)
        self.router.weight = nn.Parameter(block.router_weight.detach().clone())
        self.experts = nn.ModuleList()
        rows = block.lora_A.split(block.ranks, 1), block.bias_A.split(block.ranks)
        for a, b1, b, b2 in zip(*rows, block.lora_B.split(block.ranks), block.bias_B):
            first, second = (
                nn.Conv1d(block.width, len(b1), 3, padding=1),
                nn.Conv1d(len(b1), block.width, 1),
            )
            values = (a.permute(1, 2, 0), b1, b.T[..., None], b2)
            for parameter, value in zip((*first.parameters(), *second.parameters()), values):
                parameter.data.copy_(value)
            self.experts.append(nn.Sequential(first, nn.ReLU(), second))

    def forward(self, x):
        """(B, L, D) -> (tasks, B, L, D)"""
        gates = self.router(x).unflatten(-1, (self.tasks, -1)).softmax(-1)  # (B, L, tasks, N + 1)
        outputs = [expert(x.mT).mT for expert in self.experts]  # each (B, L, D)
        shared, own = outputs[: self.shared], outputs[self.shared :]
        return torch.stack(
            [
                sum(gates[:, :, t, n, None] * y for n, y in enumerate([*shared, own[t]]))
                for t in range(self.tasks)
            ]
        )


def step_times(width, rank, items, length, turns):
    """{block: (parameters, seconds of each turn)} of forward and backward, interleaved."""
    x = torch.randn(items, length, width)
    contenders, sizes = {}, {}
    for kind, r in (("low-rank", rank), ("full-rank", width)):
        block = UniTSE(width, (r,) * SHARED, (r,) * 2)
        plain = Plain(block)
        torch.testing.assert_close(plain(x), block(x), rtol=1e-3, atol=1e-4)
        for how, module in (("ours", block), ("plain PyTorch", plain)):
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
