"""Work that stages.py observes from outside: python -m benchmarks.gpu_day.work scenarios|small|layer"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace

import torch

from ..static import scenarios
from .stages import DEVICE, DRY

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scenario_names():
    return ["few tokens", "frozen expert"] if DRY else list(scenarios.SCENARIOS)


def run_scenarios(part):
    """Every n-th scenario in every dtype, one line each."""
    n, parts = map(int, part.split("/"))
    scenarios.DEVICE = DEVICE
    for name in scenario_names()[n::parts]:
        scenario = scenarios.SCENARIOS[name]
        if DRY:
            scenario = replace(scenario, D=32, T=3, ranks=(2,) * 3)
        for dtype in DTYPES[:1] if DRY else DTYPES:
            scenario.run(dtype)
        print(name, flush=True)
    if not DRY:
        torch.cuda.synchronize()


def small():
    """Every plan forward and backward, at sizes small enough for a sanitizer."""
    from lora_moe import functional as F
    from lora_moe import plan
    from tests.support.cases import BY_NAME, sample
    from tests.support.interpreter import Sanitizer

    names = (
        ["odd"]
        if DRY
        else ["odd", "tiles fit", "one past a tile", "unequal ranks", "shared A", "long"]
    )
    with Sanitizer() if DRY else contextlib.nullcontext():
        for name in names:
            case = BY_NAME[name]
            v = {
                k: t if t is None else t.to(DEVICE) for k, t in sample(case, torch.bfloat16).items()
            }
            leaves = [v[k].requires_grad_() for k in ("x", "router_weight", "lora_A", "lora_B")]
            for chosen in plan.PLANS:
                with plan.override(chosen):
                    y, _ = F.routed_lora(
                        *leaves, case.K, rank_offsets=case.offsets, scaling=v["scaling"], base=v["base"],
                        shared_a=case.shared_a, **case.options,
                    )  # fmt: skip
                    torch.autograd.grad(y, leaves, torch.ones_like(y))
    if not DRY:
        torch.cuda.synchronize()
    print("every plan ran")


def layer():
    """Runs the calls that static/accounting.py counts, on the device."""
    from lora_moe import LoraMoeConfig, LoraMoeLinear

    bf16 = {"dtype": torch.bfloat16, "device": DEVICE}
    base = torch.nn.Linear(4096, 4096, bias=False, **bf16).requires_grad_(False)
    experts = LoraMoeLinear(base, LoraMoeConfig(num_experts=8, r=16, top_k=2, adapter_dtype="base"))
    x = torch.randn(8192, 4096, **bf16).requires_grad_()
    y = experts(x)
    torch.autograd.grad(y, [x, *(p for p in experts.parameters() if p.requires_grad)], y.detach())
    torch.cuda.synchronize()


if __name__ == "__main__":
    {"scenarios": run_scenarios, "small": small, "layer": layer}[sys.argv[1]](*sys.argv[2:])
