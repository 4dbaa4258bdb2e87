"""Prints, as JSON, how other token counts affect the launches; see test_token_counts.py.

compiled  for every scenario and plan: kernels that a random T compiles after those of `warm_up`
grids     the largest second and third grid axes, for more tokens than fit into 65,535 tiles
"""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import replace

import torch
from triton.runtime.jit import JITFunction

from benchmarks.static.gpu_static import EACH_KERNEL
from benchmarks.static.launches import Launch, launches
from benchmarks.static.scenarios import SCENARIOS
from lora_moe.plan import PLANS
from lora_moe.warmup import TOKENS

TARGET = "sm_90"
MILLIONS = 3 * 2**20 + 5


@contextlib.contextmanager
def keys_only():
    """Yields a list of the kernels that would be compiled, starting from an empty cache; compiles nothing."""
    compile_, seen, known = JITFunction._do_compile, [], set()

    def note(jit, key, signature, device, *rest):
        seen.append(f"{jit.__name__} {key}")
        known.add(jit)
        jit.device_caches[device][0][key] = jit
        return jit

    JITFunction._do_compile = note
    try:
        yield seen
    finally:
        JITFunction._do_compile = compile_
        for jit in known:
            jit.device_caches.clear()


def new_kernels(scenario, dtype, random_ts):
    """["T=...: kernel"] for random token counts whose kernels are not covered by warm_up."""
    with keys_only() as seen, launches(TARGET):
        for T in TOKENS:
            scenario.run(dtype, T)
        warm, found = set(seen), []
        for T in random_ts:
            seen.clear()
            scenario.run(dtype, T)
            found += [f"T={T}: {key}" for key in seen if key not in warm]
    return found


def widest(scenario):
    with launches(TARGET, compiled=False) as seen:
        scenario.run(torch.bfloat16, MILLIONS)
    grids = [(*event.grid, 1, 1)[1:3] for event in seen if isinstance(event, Launch)]
    return [max(axis) for axis in zip(*grids)]


def names(scenarios):
    with launches(TARGET, compiled=False) as seen:
        for name in scenarios:
            SCENARIOS[name].run(torch.bfloat16)
    return sorted({event.name for event in seen if isinstance(event, Launch)})


def main():
    draw, found = random.Random(0), {"compiled": {}, "grids": {}, "kernels": names(EACH_KERNEL)}
    for plan in (None, *PLANS):
        for name, scenario in SCENARIOS.items():
            if plan is None and scenario.plan:
                continue
            forced = replace(scenario, plan=plan)
            ts = [
                draw.randint(1, 20_000),
                draw.randint(1, 2000) | 1,
                draw.choice([15, 16, 17, 64, 65]),
            ]
            ts += [draw.randint(4000, 4200), draw.choice([4096, 4097, 8448, 8449, 16385])]
            for dtype in (torch.bfloat16, torch.float32):
                found["compiled"][f"{plan}, {name}, {dtype}"] = new_kernels(forced, dtype, ts)
            found["grids"][f"{plan}, {name}"] = widest(forced)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
