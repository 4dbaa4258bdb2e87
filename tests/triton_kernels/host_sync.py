"""Prints, as JSON, what each call of the package would make a GPU's host wait for; see test_no_host_sync.py.

A process of its own, since the kernels are not interpreted here.  On the meta device there is no value to
wait for: reading one raises, and a copy from or to the host shows among the operators.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.launches import Launch, Operator, launches
from benchmarks.scenarios import DEVICE, SCENARIOS, operands

PLANTED = {
    "item": lambda v: v["gates"].sum().item(),
    "tolist": lambda v: v["ids"].tolist(),
    "cpu": lambda v: v["ids"].cpu(),
    "nonzero": lambda v: v["ids"].nonzero(),
    "unique": lambda v: v["ids"].unique(),
    "branch on a value": lambda v: 1 if v["ids"].max() > 0 else 0,
    "boolean mask": lambda v: v["x"][v["gates"][:, 0] > 0],
    "a list to the device": lambda v: torch.tensor([1, 2, 3], device=DEVICE),
    "a tensor to the device": lambda v: v["ids"].copy_(torch.zeros(v["ids"].shape)),
}


class Names(TorchDispatchMode):
    """Which operators of ours ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_moe":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def noting_constants(seen):
    """Tensors made of Python's numbers on the device: each is a copy, and none shows as an operator."""
    made = {name: getattr(torch, name) for name in ("tensor", "as_tensor", "asarray")}

    def note(name, *args, **kwargs):
        result = made[name](*args, **kwargs)
        if result.device.type == DEVICE:
            seen.append(f"torch.{name}")
        return result

    for name in made:
        setattr(torch, name, partial(note, name))
    try:
        yield
    finally:
        for name, function in made.items():
            setattr(torch, name, function)


def waits(call, ran=None):
    """Of the first call already: it may be one that a CUDA graph captures."""
    try:
        with launches("sm_90", compiled=False) as seen, noting_constants(seen), ran or Names():
            call()
    except Exception as error:
        return [f"{type(error).__name__}: {error}"], 0
    others = [event for event in seen if not isinstance(event, Launch)]
    return [str(getattr(e, "func", e)) for e in others if on_host(e)], len(seen) - len(others)


def on_host(event):
    """A number that became a tensor of no dimension goes to a kernel as its argument."""
    tensors, _ = (
        tree_flatten((event.args, event.result)) if isinstance(event, Operator) else ([], None)
    )
    on_cpu = (isinstance(v, torch.Tensor) and v.device.type == "cpu" and v.dim() for v in tensors)
    return isinstance(event, str) or any(on_cpu)


def main(*plans):
    found = {}
    ran = Names()
    with launches("sm_90", compiled=False):
        for name, scenario in SCENARIOS.items():
            for plan in plans:
                forced = replace(scenario, plan=plan)
                words, launched = waits(partial(forced.run, torch.bfloat16), ran)
                found[f"{plan}: {name}"] = words if launched or words else ["nothing was launched"]
        v = operands(SCENARIOS["few tokens"], torch.bfloat16, 16)
        found |= {f"planted: {name}": waits(partial(call, v))[0] for name, call in PLANTED.items()}
    print(json.dumps({"waits": found, "operators": sorted(ran.names)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
