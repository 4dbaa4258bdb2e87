"""The machine code of the kernels in csrc/cuda, as compiled by nvcc; needs no GPU.

    python -m benchmarks.cuda_static [--targets sm_80,sm_90] [--json FILE] [--markdown FILE] [--summary FILE]

Each file is compiled for each target and the machine code is read: registers, spills, shared memory and
occupancy of every kernel; tensor-core instructions, fp32 FMAs and the widest global load in the loops
that multiply.  The keys of a row are those of the Triton table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import binary, report
from .binary import count

SOURCES = Path(__file__).parents[2] / "csrc/cuda"
TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
# warps and blocks per SM, KB of shared memory per SM and per block
SM = {
    "sm_75": (32, 16, 64, 64),
    "sm_80": (64, 32, 164, 163),
    "sm_90": (64, 32, 228, 227),
    "sm_100": (64, 32, 228, 227),
    "sm_120": (48, 24, 100, 99),
}
WARPS = 8  # in every kernel's blocks
DTYPES = {"__nv_bfloat16": "bfloat16", "__half": "float16", "float": "float32"}
PRODUCTS = ("shrink_kernel", "expand_kernel", "wgrad_kernel")
MATMULS = (*PRODUCTS, *(f"segmented_{name}" for name in PRODUCTS))


def rows(targets=TARGETS, jobs=2) -> list[dict]:
    """One row per kernel and target; the bf16 stubs on sm_75 are left out."""
    work = itertools.product(sorted(SOURCES.glob("*.cu")), targets)
    with ThreadPoolExecutor(jobs) as pool:
        return [row for found in pool.map(lambda w: list(rows_of(*w)), work) for row in found]


def rows_of(source, target):
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernels.cubin")
        output = run("nvcc", "-std=c++20", "-O3", f"-arch={target}", "-cubin", "-o", cubin, source)
        if output:
            raise RuntimeError(f"{source.name}, {target}: nvcc warns\n{output}")
        usage = run(binary.TOOLS / "cuobjdump", "--dump-resource-usage", cubin)
        code = run(binary.TOOLS / "nvdisasm", "-c", cubin)
    resources = dict(re.findall(r"Function (\S+):\s+(.*)", usage))
    for function, text in functions(code):
        name, dtype, config = describe(function)
        if name in MATMULS and dtype == "bfloat16" and target == "sm_75":
            continue
        yield {
            "kernel": name,
            "config": config,
            "dtype": dtype,
            "target": target,
            **occupancy(target, resources[function]),
            **instructions(list(binary.sass(text))),
        }


def run(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr}")
    return done.stdout + (done.stderr if command[0] == "nvcc" else "")


def functions(code):
    """(name, machine code) of every kernel."""
    parts = re.split(r"^\.text\.(\S+):$", code, flags=re.M)
    return zip(parts[1::2], parts[2::2])


def describe(function):
    """shrink_kernel<__half, 64, 128, Middle<__half>> -> shrink_kernel, float16, 64 x 128 Middle"""
    readable = run("c++filt", function)
    name = re.search(r"(\w+_kernel)\b", readable).group(1)
    arguments = re.search(rf"{name}<(.*)>\(", readable)
    arguments = arguments.group(1) if arguments else ""
    dtypes = [DTYPES[d] for d in re.findall(r"__nv_bfloat16|__half|float", arguments)]
    tile = " x ".join(re.findall(r"\b\d+\b", arguments))
    middle = re.search(r"Middle\w*", arguments)
    mixed = "fp32 H" if name == "wgrad_kernel" and dtypes[0] != dtypes[1] else ""
    config = " ".join(filter(None, (tile, middle and middle.group(0), mixed)))
    return name, dtypes[-1] if dtypes else "float32", config


def occupancy(target, usage):
    registers, stack, shared = (
        int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "SHARED")
    )
    warps, blocks, sm_kb, block_kb = SM[target]
    # a warp gets registers in units of 256, from its quarter of the SM; a block reserves 1 KB from sm_80 on
    a_warp = -(-registers * 32 // 256) * 256
    most = {
        "registers": 4 * (16384 // a_warp) // WARPS,
        "shared memory": sm_kb * 1024 // (shared + (0 if target == "sm_75" else 1024) or 1),
        "warps": warps // WARPS,
        "blocks": blocks,
    }
    limiter = min(most, key=most.get)
    return {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": shared,
        "shared_limit": min(block_kb, 99) * 1024,
        "occupancy": round(most[limiter] * WARPS / warps, 3),
        "limiter": limiter,
    }


def instructions(code):
    multiply = [
        loop
        for loop in binary.loops(code)
        if count(binary.TENSOR_CORE, loop) or count(binary.FP32_FMA, loop) >= 32
    ]
    in_loops = list(itertools.chain(*multiply))
    loads = (re.search(r"^LDG\S*\.(32|64|128)\b", i.text) for i in in_loops)
    widths = [int(load.group(1)) for load in loads if load]
    return {
        "spills": count(re.compile(r"STL|LDL"), code),
        "tensor_core_ops": count(binary.TENSOR_CORE, in_loops),
        "fp32_fmas": count(binary.FP32_FMA, in_loops),
        "float_atomics": count(binary.FLOAT_ATOMIC, code),
        "load_bits": max(widths, default=0),
    }


def violations(row):
    """Yields the guarantees that the kernel violates."""
    if row["spills"]:
        yield f"{row['spills']} spills"
    if row["shared_bytes"] > row["shared_limit"]:
        yield f"{row['shared_bytes']} bytes of shared memory"
    if row["float_atomics"]:
        yield "float atomics"
    if row["kernel"] in MATMULS and row["load_bits"] < 128:
        yield f"loads of {row['load_bits']} bits"
    halves = row["kernel"] in MATMULS and row["dtype"] != "float32"
    if halves and not row["tensor_core_ops"]:
        yield "no tensor cores"
    if halves and row["fp32_fmas"] >= 64:  # the gates' exponentials have 36, units of terms 16
        yield f"{row['fp32_fmas']} fp32 FMAs"


TITLE = "# The CUDA kernels, compiled"
READ = """
Read from what nvcc 13.0 compiles, without a GPU: `python -m benchmarks.cuda_static`. Blocks have
8 warps; bf16 needs sm_80. Instructions are counted in the loops that multiply.
"""
PROMISES = """
Guaranteed for each kernel: no spills, no float atomics, shared memory within the GPU's limit, and in the
products tensor cores for 16-bit dtypes and loads of 128 bits. Nothing here ran on a GPU, and no speed is
claimed.
"""


def cells(row):
    """A row of the table."""
    return {
        "target": row["target"],
        "kernel": row["kernel"],
        "tile": row["config"],
        "dtype": row["dtype"],
        "registers": row["registers"],
        "spills": row["spills"],
        "shared KB": round(row["shared_bytes"] / 1024, 1),
        "occupancy": f"{row['occupancy']:.0%}",
        "limited by": row["limiter"],
        "tensor-core ops": row["tensor_core_ops"],
        "FMAs": row["fp32_fmas"],
        "load bits": row["load_bits"],
    }


def page(found):
    """Lines of the page with all rows."""
    return [TITLE, READ, *report.table([cells(row) for row in found])]


def summary(found):
    """Lines of the summary page."""
    tables = report.summary([cells(row) for row in found])
    link = "All rows: [generated/cuda_static.md](generated/cuda_static.md)."
    return [TITLE, READ, PROMISES.strip(), "", *tables, "", link]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write all rows")
    parser.add_argument("--summary", type=Path, help="write the extremes of each target and kernel")
    args = parser.parse_args()
    if shutil.which("nvcc") is None:
        parser.exit(2, "cuda_static: nvcc is not in PATH\n")
    found = rows(args.targets.split(","))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.summary:
        args.summary.write_text("\n".join(summary(found)) + "\n")
    if args.markdown:
        args.markdown.write_text("\n".join(page(found)) + "\n")
    if not (args.json or args.markdown or args.summary):
        print("\n".join(page(found)))
    broken = [
        f"{r['kernel']} {r['config']} {r['dtype']} {r['target']}: {why}"
        for r in found
        for why in violations(r)
    ]
    print(
        *broken
        or [f"{len(found)} kernels: no spills, no float atomics, 128-bit loads, tensor cores"],
        sep="\n",
    )
    raise SystemExit(bool(broken))
