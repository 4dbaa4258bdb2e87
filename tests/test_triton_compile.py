"""What the compiler makes of every Triton kernel for GPUs that need not be there.

Spills, shared memory, tensor cores, with the tiles that the launchers choose; in a process of its
own, since in this one the kernels may be interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}  # a block's share
WANTED = [
    "bfloat16",  # all scenarios
    "float32:many tokens,few tokens,1024 ranks,unequal ranks,matmuls",
    "float16:many tokens,few tokens",  # differs from bf16 in the router's products only
]
MATMULS = {"_shrink_kernel", "_expand_kernel", "_gram_kernel"}
FUSED = {"_routed_lora_kernel", "_rank_gradient_kernel"}  # with a loop where tokens are many
MIDDLES = {"_gate_ranks_kernel", "_gate_ranks_backward_kernel"}
ROUTERS = {"_router_topk_kernel", "_router_topk_backward_kernel"}


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_triton_compile(target):
    reports = compile_for(target)
    assert {r["kernel"] for r in reports} == MATMULS | FUSED | MIDDLES | ROUTERS
    for dtype in ("bfloat16", "float16", "float32"):
        assert {r["kernel"] for r in reports if r["dtype"] == dtype} >= MATMULS | FUSED
    for r in reports:
        assert r["spills"] == 0, r
        assert r["shared"] <= SHARED_MEMORY[target], r
        assert r["scenario"] != "another T", f"compiled anew for another number of tokens: {r}"
        half, many = r["dtype"] != "float32", r["scenario"] == "many tokens"
        if half and (r["kernel"] in MATMULS or many):
            assert r["matrix"] > 0, f"no tensor core instructions: {r}"
        if half and many:
            assert r["wide_loads"] > 0, f"no 128-bit loads: {r}"


def compile_for(target):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["LORA_MOE_BACKEND"] = "reference"
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_kernels.compile_report", target, *WANTED],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
