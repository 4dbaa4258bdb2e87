"""Prints, as JSON, the operations of each call that would synchronize the host; see test_no_host_sync.py.

A separate process, because the kernels are not interpreted here.  On the meta device there is no value to
wait for: reading one raises, and a copy from or to the host shows up among the operators.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.static.launches import Launch, Operator, launches
from benchmarks.static.scenarios import DEVICE, SCENARIOS, operands
from lora_moe.vllm import ops as serving
from lora_moe.vllm import rules as serving_rules

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


def fused_layer(v):
    """Two banks with the same router options, as called by a server."""
    serving.add_experts(v["x"].detach(), v["base"].detach(), *banks(v, 2), rules(v, 2))


def unlike_banks(v):
    different = serving_rules.to_text((rule(v, 0, 2), dataclasses.replace(rule(v, 1, 2), top_k=1)))
    serving.add_experts(v["x"].detach(), v["base"].detach(), *banks(v, 2), different)


def row_parallel(v):
    """The experts for one rank's part of x; the server sums the logits over ranks."""
    (w,), (a,), *rest = banks(v, 1)
    s, logits = serving.shrink(v["x"].detach(), w, a)
    serving.add_gated(s, logits, v["base"].detach(), *(b for (b,) in rest), rules(v, 1))


def banks(v, count):
    """[w, a, b, scaling, experts, bias, router_bias] with one entry per bank, contiguous in memory."""
    E, D = len(v["W"]), v["B"].shape[1] // count
    w, a = (v[name].detach().repeat(count, 1).chunk(count) for name in ("W", "A"))
    scaling, bias = (v["W"].new_empty(count * E).split(E) for _ in range(2))
    experts = [torch.empty(len(v["B"]), dtype=torch.int64, device=DEVICE)] * count
    columns = v["B"].detach().split(D, 1)
    return [list(t) for t in (w, a, columns, scaling, experts, bias, bias)]


def rule(v, i, count):
    D, E = v["B"].shape[1] // count, len(v["W"])
    offsets = tuple(range(0, len(v["B"]) + 1, len(v["B"]) // E))
    return serving_rules.Rule(i * D, (i + 1) * D, offsets, False, 2, "softmax", True, None, None)


def rules(v, count):
    return serving_rules.to_text(tuple(rule(v, i, count) for i in range(count)))


SERVING = {"fused layer": fused_layer, "unlike banks": unlike_banks, "row parallel": row_parallel}


class Names(TorchDispatchMode):
    """Records which of our operators ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_moe":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def noting_constants(seen):
    """Records tensors made from Python numbers on the device: each is a copy that is not an operator."""
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
    """([synchronizing operations], launches) of the first call, which a CUDA graph may capture."""
    try:
        with launches("sm_90", compiled=False) as seen, noting_constants(seen), ran or Names():
            call()
    except Exception as error:
        return [f"{type(error).__name__}: {error}"], 0
    others = [event for event in seen if not isinstance(event, Launch)]
    return [str(getattr(e, "func", e)) for e in others if on_host(e)], len(seen) - len(others)


def on_host(event):
    """Whether an event involves the host; 0-dim tensors of numbers do not, as they are kernel arguments."""
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
                forced = dataclasses.replace(scenario, plan=plan)
                words, launched = waits(partial(forced.run, torch.bfloat16), ran)
                found[f"{plan}: {name}"] = words if launched or words else ["nothing was launched"]
        for T in (16, 1024):
            v = operands(SCENARIOS["few tokens"], torch.bfloat16, T)
            for name, call in SERVING.items():
                words, launched = waits(partial(call, v))
                words = words if launched or words else ["nothing was launched"]
                found[f"serving, {T} tokens: {name}"] = words
        v = operands(SCENARIOS["few tokens"], torch.bfloat16, 16)
        found |= {f"planted: {name}": waits(partial(call, v))[0] for name, call in PLANTED.items()}
    print(json.dumps({"waits": found, "operators": sorted(ran.names)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
