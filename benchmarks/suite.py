"""Times every contender on every shape, after holding its numbers to fp64, and keeps all samples."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks import machine, timing
from benchmarks.contenders import (
    LIMITS,
    LeftOut,
    contenders,
    copies_for,
    flat,
    prepare,
    truth,
    worst_error,
)
from benchmarks.shapes import sample

FORMAT = 1  # of the JSON
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Options:
    device: str = "cpu"
    repeats: int = 7
    compiled: bool = True
    quick: bool = False
    dtypes: tuple = (torch.float32, torch.bfloat16)
    passes: tuple = PASSES
    clock: Callable = field(default=timing.wall_clock, repr=False)


def run(shapes, options, progress=lambda text: None):
    """The whole report as plain data: the machine, its limits, a row per shape, dtype and pass."""
    limits = machine.limits(options.device, options.clock, options.quick)
    rows = []
    for shape in shapes:
        for dtype in options.dtypes:
            for name in options.passes:
                progress(f"{shape} {dtype} {name}")
                rows.append(measure(shape, dtype, name == PASSES[1], options))
    return {
        "format": FORMAT,
        "machine": machine.describe(options.device),
        "limits": limits,
        "repeats": options.repeats,
        "rows": rows,
    }


def measure(shape, dtype, backward, options):
    """Seconds of every contender turn by turn, errors in units, what was left out and why."""
    torch._dynamo.reset()
    inputs = sample(shape, dtype, options.device)
    copies = copies_for(shape, inputs, machine.cache_bytes(options.device))
    calls, errors, left_out, right = {}, {}, {}, {}
    for contender in contenders(options.device, options.compiled):
        if contender.same not in right:
            right[contender.same] = truth(contender, shape, inputs, backward)
        try:
            call = prepare(contender, shape, inputs, backward, copies)
            errors[contender.name] = check(contender, call, right[contender.same], shape, dtype)
            calls[contender.name] = call
        except LeftOut as why:
            left_out[contender.name] = str(why)
        except Exception as why:  # of whatever kind torch.compile and grouped_mm raise
            left_out[contender.name] = f"{type(why).__name__}: {first_line(why)}"
    return {
        "shape": vars(shape),
        "text": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "pass": PASSES[backward],
        "flops": shape.flops(backward),
        "bytes": shape.bytes(inputs.x.element_size(), inputs.touched, backward),
        "copies": copies,
        "seconds": timing.interleave(calls, options.repeats, options.clock),
        "errors": errors,
        "left_out": left_out,
    }


def check(contender, call, right, shape, dtype):
    """The error in units in the last place; raises LeftOut where it is that of a wrong answer."""
    units = worst_error(flat(contender, call(), shape), right) / (torch.finfo(dtype).eps / 2)
    if not units <= LIMITS[dtype]:
        raise LeftOut(f"wrong: {units:.0f} units in the last place from fp64")
    return units


def first_line(error):
    return next((line for line in str(error).splitlines() if line.strip()), "")[:200]
