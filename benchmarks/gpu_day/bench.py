"""Stage `bench`: microseconds per call in a CUDA graph, forward and with its backward.

Facts, not checks: the base product, ours, stacked matmuls eager and compiled, and PEFT's plain LoRA.

Letters: T tokens, E experts, r one expert's rank, K picked experts per token, D columns of x and of y.
"""

from __future__ import annotations

import torch

from .. import gpu, timing
from ..contenders import contenders, prepare, states
from ..shapes import Shape, sample

NAMES = ("ours", "stacked", "stacked, compiled", "plain LoRA")


def main(tell, device, dry):
    tokens, experts, D = ([2], [4], 32) if dry else ([1, 16, 1024, 4608, 8192, 8704], [8, 64], 4096)
    clock = timing.warm if dry else gpu.graph
    for E in experts:
        for T in tokens:
            shape = Shape(T, D, D, E, 2 if dry else 16)
            for backward in (False, True):
                told = measure(shape, device, backward, clock, dry)
                what = f"{shape}, {'with backward' if backward else 'forward'}, bf16"
                tell(what, None, ", ".join(f"{name} {us}" for name, us in told.items()) + " us")
    tell("every shape was timed", True)


def measure(shape, device, backward, clock, dry):
    inputs = sample(shape, torch.bfloat16, device)
    told = {"base": micro(clock, base_product(shape, device, backward))}
    for c in contenders(device, compiled=not dry):
        if c.name in NAMES:
            state = states(c.layout, shape, inputs, backward, 1)
            call = prepare(c.forward, state, shape.K, inputs.dy if backward else None)
            told[c.name] = micro(clock, call)
    return told


def micro(clock, call):
    try:
        return f"{clock(call, 1) * 1e6:.1f}"
    except Exception as error:  # one that cannot be captured is reported, not fatal
        return f"({type(error).__name__})"


def base_product(shape, device, backward):
    bf16 = {"dtype": torch.bfloat16, "device": device}
    x, w = torch.randn(shape.T, shape.D_in, **bf16), torch.randn(shape.D_out, shape.D_in, **bf16)
    dy = torch.randn(shape.T, shape.D_out, **bf16)

    def call():
        y = x @ w.T
        return (y, dy @ w) if backward else y

    return call
