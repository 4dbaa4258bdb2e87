"""Times every contender on every shape, after comparing its results with fp64, and keeps all samples."""

import math
import os
import time
from dataclasses import dataclass, field

import torch

from benchmarks import contenders as entry
from benchmarks import machine, timing
from benchmarks.shapes import sample

FORMAT = 1  # of the JSON
PASSES = ("forward", "forward+backward")
CPU_CLOCKS = {"wall clock": timing.warm}


@dataclass(frozen=True)
class Options:
    device: str = "cpu"
    repeats: int = 7
    compiled: bool = True
    quick: bool = False
    dtypes: tuple = (torch.float32, torch.bfloat16)
    passes: tuple = PASSES
    clocks: dict = field(default_factory=lambda: CPU_CLOCKS)  # {name: timing.warm or its like}

    @property
    def cache(self):
        """Size of the cache that must not hold the weights in decode."""
        return 1 if self.quick else machine.cache_bytes(self.device)

    @property
    def clock(self):
        return next(iter(self.clocks.values()))


def run(shapes, options, progress=lambda text: None, keep=lambda result: None):
    """The report as plain data: the machine, its limits, one row per shape, dtype, pass and clock.

    keep(result) is called after each row with all results so far.  An interrupt ends the run: the result
    contains what was measured, and `stopped` says how much is missing.
    """
    load = os.getloadavg()[0]
    limits = machine.limits(options.device, options.clock, options.quick)
    result = {
        "format": FORMAT,
        "machine": machine.describe(options.device),
        "load": load,  # processes waiting for a core when the run began; 0 on an idle machine
        "limits": limits,
        "repeats": options.repeats,
        "rows": [],
    }

    def add(shape, dtype, name):
        rows = measure(shape, dtype, name, options)
        result["rows"] += rows
        for row in rows:
            progress(f"    {row['clock']}: {timing.brief(row['seconds'])}")
        keep(result)

    steps = [(s, d, name) for s in shapes for d in options.dtypes for name in options.passes]
    if not each(steps, add, result, progress):
        after = machine.limits(options.device, options.clock, options.quick)
        result["limits"] = machine.best(limits, after)
    return result


def each(steps, act, result, progress) -> str:
    """Calls act(*step) for each step, after printing how long the rest takes, until interrupted.

    Returns, and stores in result["stopped"], how far it got; "" if it finished.
    """
    begin = time.monotonic()
    for done, step in enumerate(steps):
        left = (time.monotonic() - begin) / done * (len(steps) - done) if done else 0
        about = f", about {math.ceil(left / 60)} min left" if done else ""
        progress(f"[{done + 1}/{len(steps)}{about}] {' '.join(map(str, step))}")
        try:
            act(*step)
        except KeyboardInterrupt:
            result["stopped"] = f"stopped after {done} of {len(steps)} measurements"
            progress(result["stopped"])
            return result["stopped"]
    return ""


def measure(shape, dtype, name, options):
    """One row per clock: seconds of each contender turn by turn, errors, what was left out and why."""
    inputs, backward = sample(shape, dtype, options.device), name == PASSES[1]
    copies = entry.copies_for(shape, inputs, options.cache)
    calls, errors, left_out = admit(shape, inputs, backward, copies, options)
    facts = {
        "shape": vars(shape),
        "text": str(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "pass": name,
        "flops": shape.flops(backward),
        "bytes": shape.bytes(inputs.x.element_size(), inputs.touched, backward),
        "copies": copies,
        "errors": errors,
    }
    rows = []
    for clock_name, clock in options.clocks.items():
        refused = dict(left_out)
        seconds = timing.interleave(
            calls,
            options.repeats,
            clock,
            refuse=lambda n, why, r=refused: r.update({n: reason(why)}),
        )
        rows.append(facts | {"clock": clock_name, "seconds": seconds, "left_out": refused})
    return rows


def admit(shape, inputs, backward, copies, options):
    """{name: call} of the correct contenders, {name: error in units}, {name: why left out}."""
    torch._dynamo.reset()
    calls, errors, left_out, states, right = {}, {}, {}, {}, {}
    dy = inputs.dy if backward else None
    for one in entry.contenders(options.device, options.compiled):
        if not one.differs(inputs.x.dtype):
            continue
        kind = one.layout, one.adapters
        try:
            entry.refuse_hopeless(one.name, shape, inputs.x.element_size())
            if one.same not in right:
                right[one.same] = entry.truth(one, shape, inputs, backward)
            if kind not in states:
                states[kind] = entry.states(
                    one.layout, shape, inputs, backward, copies, one.adapters
                )
            call = entry.prepare(one.forward, states[kind], shape.K, dy)
            outputs = entry.joined(call(), one.layout, shape)
            errors[one.name] = units = entry.units(outputs, right[one.same], inputs.x.dtype)
            if not units <= entry.LIMITS[inputs.x.dtype]:
                raise entry.LeftOut(f"wrong: {units:.0f} units in the last place from fp64")
            calls[one.name] = call
        except Exception as why:  # torch.compile and grouped_mm may raise anything
            left_out[one.name] = reason(why)
    return calls, errors, left_out


def reason(why):
    """An exception in one line; torch.compile lists all operands before the actual error."""
    text = str(why).rpartition("): got ")[2]
    text = next((line for line in text.splitlines() if line.strip()), "")[:160]
    return text if isinstance(why, entry.LeftOut) else f"{type(why).__name__}: {text}"
