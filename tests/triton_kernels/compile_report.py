"""Compiles every Triton kernel for one GPU that need not be there, and reports what it takes of it.

    python -m tests.triton_kernels.compile_report gfx942 bfloat16 "float32:many tokens,few tokens"

The launchers run as they are, on CPU tensors: only the driver is replaced by one that names the target, and a
launch by a compilation.  So what is read here is what a user's call launches, tile for tile.  One
JSON line a kernel.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FEW, SOME, MANY = 16, 1024, 8192
D = 1024


class Driver:
    """Names a target; there is no device behind it."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_instead_of_launching():
    """From here on kernel[grid](...) compiles; what it compiled first is collected in the dict returned."""
    run, found = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(kernel.hash, kernel)

    JITFunction.run = compile_only
    return found


# --- what to call -------------------------------------------------------------------------------


def operands(dtype, T, ranks, K=2):
    """x, w, a, b, scaling, offsets and a routing; values do not matter."""
    E, R = len(ranks), sum(ranks)
    offsets = [sum(ranks[:e]) for e in range(E + 1)]
    x, w = torch.zeros(T, D, dtype=dtype), torch.zeros(E, D)
    a, b = torch.zeros(R, D, dtype=dtype), torch.zeros(R, D, dtype=dtype)
    routing = torch.zeros(T, K, dtype=torch.int32), torch.zeros(T, K), torch.zeros(T, E)
    return x, w, a, b, torch.ones(E), offsets, routing


def routed(kernels, dtype, T, ranks):
    x, w, a, b, scaling, offsets, (ids, weights, logits) = operands(dtype, T, ranks)
    experts = scaling, offsets, False
    kernels.routed_lora(
        x, w, a, b, x, None, *experts, 2, "softmax", True, math.inf, 0.0, "rank_dense"
    )
    s = torch.zeros(T, len(a))
    aux = weights, logits, scaling, torch.zeros(T)
    kernels.routed_lora_backward(
        x, *aux, x, w, a, b, s, ids, weights, logits, *experts, "softmax", True,
        [], True, True, True, True, "rank_dense",
    )  # fmt: skip


def grouped(kernels, dtype, T, ranks, shared_a=False):
    x, _, a, b, scaling, offsets, (ids, weights, _) = operands(dtype, T, ranks)
    a = a[: ranks[0]] if shared_a else a
    routing = ids, weights, scaling, offsets, shared_a
    kernels.grouped_lora(x, a, b, None, *routing, "rank_dense")
    s = torch.zeros(T, len(a))
    kernels.grouped_lora_backward(x, x, a, b, s, *routing, [], True, True, True, True, "rank_dense")


def matmuls(kernels, dtype):
    """The router alone, and the two matmuls in fp32 rank space."""
    x, w, a, b, _, _, (ids, weights, logits) = operands(dtype, MANY, [16] * 8)
    kernels.router_topk(x, w, torch.zeros(8), 2, "sigmoid", True, math.inf, 0.0)
    kernels.router_topk_backward(weights, None, None, None, ids, weights, logits, "sigmoid", True)
    s = torch.zeros(MANY, len(a))
    kernels.expand(s, b, None, None, x, dtype)
    kernels.gram(s, x)
    kernels.shrink(x, a, w)


SCENARIOS = {
    "many tokens": lambda k, dtype: routed(k, dtype, MANY, [16] * 8),
    "another T": lambda k, dtype: routed(k, dtype, MANY + 13, [16] * 8),  # nothing new
    "some tokens": lambda k, dtype: routed(k, dtype, SOME, [16] * 8),
    "few tokens": lambda k, dtype: routed(k, dtype, FEW, [16] * 8),
    "256 ranks": lambda k, dtype: routed(k, dtype, MANY, [16] * 16),
    "1024 ranks": lambda k, dtype: routed(k, dtype, MANY, [16] * 64),
    "unequal ranks": lambda k, dtype: grouped(k, dtype, MANY, [4, 8, 16, 24]),
    "shared A": lambda k, dtype: grouped(k, dtype, MANY, [16] * 8, shared_a=True),
    "matmuls": matmuls,
}


# --- what the compiler made of it ---------------------------------------------------------------


def report(kernel, target):
    resources = nvidia(kernel) if target.backend == "cuda" else amd(kernel)
    return {"kernel": kernel.metadata.name, "shared": kernel.metadata.shared, **resources}


def nvidia(kernel):
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = run_tool(tools / "cuobjdump", "--dump-resource-usage", file.name)
        sass = run_tool(tools / "nvdisasm", "-c", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "matrix": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|QGMMA|UTCQMMA)\b", sass)),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)[.\w]*\.128\b", sass)),
    }


def run_tool(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def amd(kernel):
    asm = kernel.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", asm).group(1))

    # scalar registers spilled into vector registers cost nothing; scratch memory does
    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("private_segment_fixed_size"),
        "matrix": asm.count("v_mfma"),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
    }


def main(target, *wanted):
    triton.runtime.driver.set_active(Driver(TARGETS[target]))
    from lora_moe import triton_kernels

    found, reported = compile_instead_of_launching(), set()
    for words in wanted:
        dtype, *names = words.split(":")
        for scenario in names[0].split(",") if names else SCENARIOS:
            SCENARIOS[scenario](triton_kernels, getattr(torch, dtype))
            for key in found.keys() - reported:
                line = {"target": target, "dtype": dtype, "scenario": scenario}
                print(json.dumps(line | report(found[key], TARGETS[target])), flush=True)
            reported |= found.keys()


if __name__ == "__main__":
    main(*sys.argv[1:])
