"""The machine code of every Triton kernel; needs no GPU.

    python -m benchmarks.gpu_static [--targets sm_90,gfx942] [--dtypes bfloat16] [--scenarios "many tokens"]
                                    [--json FILE] [--markdown FILE] [--summary FILE] [--check]

The public functions run up to their launches (launches.py), each launch is compiled for the
target, and the machine code is read: registers, spills, shared memory and occupancy; and, in the loops that
contain a dot, tensor-core instructions, fp32 FMAs and the width of the global loads.  One process per target.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import report

DEFAULT = ("sm_80", "sm_90", "sm_100", "gfx90a", "gfx942")
SMALL = ("sm_86", "sm_89", "sm_120")  # 99 KB of shared memory per block
ROOT = Path(__file__).parents[2]
# a few scenarios that together launch every kernel: what --check compiles
EACH_KERNEL = (
    "many tokens", "few tokens", "1024 ranks, dense", "segmented", "frozen expert", "router", "logits given",
    "slots summed",
)  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32")


def compile_for(target, dtypes, scenarios):
    """Print a JSON row for every new kernel and configuration of each scenario."""
    import torch

    from .launches import TARGETS, Launch, launches
    from .rows import row
    from .scenarios import SCENARIOS

    for name in dtypes:
        known = set()
        for scenario in scenarios or SCENARIOS:
            # run twice: another number of tokens must not compile anything
            for T in (SCENARIOS[scenario].T, SCENARIOS[scenario].T - 3):
                with launches(target) as seen:
                    operands = SCENARIOS[scenario].run(getattr(torch, name), T)
                for launch in seen:
                    key = isinstance(launch, Launch) and compiled_key(launch)
                    if key and key not in known:
                        known.add(key)
                        facts = {"dtype": name, "target": target, "scenario": scenario}
                        facts["another_T"] = T != SCENARIOS[scenario].T
                        line = row(launch, operands, TARGETS[target]) | facts
                        print(json.dumps(line), flush=True)


def compiled_key(launch):
    failed = isinstance(launch.kernel, Exception)
    return f"{launch.name}: {launch.kernel}" if failed else launch.kernel.hash


def rows(targets, dtypes=DTYPES, scenarios=(), jobs=2):
    """All rows, compiling for `jobs` targets at a time."""

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def one(target):
        command = [sys.executable, "-m", "benchmarks.gpu_static", "--one", target]
        command += ["--dtypes", ",".join(dtypes), "--scenarios", ";".join(scenarios)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"{target}: {done.stderr}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(jobs) as pool:
        return [row for found in pool.map(one, targets) for row in found]


def violations(row):
    """Yields the guarantees for default configurations that the row violates."""
    if "error" in row:
        yield f"does not compile: {row['error']}"
    if row["spills"]:
        yield f"{row['spills']} spills"
    if row["shared_bytes"] > row["shared_limit"]:
        yield f"{row['shared_bytes']} of {row['shared_limit']} bytes of shared memory"
    if row["dtype"] != "float32" and row["tensor_core_loops"] < row["dot_loops"]:
        yield f"tensor cores in {row['tensor_core_loops']} of {row['dot_loops']} loops with a dot"
    if row["dtype"] != "float32" and row["dots"] and not row["tensor_core_ops"]:
        yield "no tensor cores"
    if row["load_bits"] < 128 and row["wide_loads"]:
        narrow = {name: bits for name, bits in row["wide_loads"].items() if bits < 128}
        yield f"narrow loads {narrow}"
    if row["float_atomics"]:
        yield f"{row['float_atomics']} float atomics"
    if row["another_T"]:
        yield "recompiled for another number of tokens"


def check(rows):
    """Print the violations and the size of the check; return whether there are none."""
    broken = [(row, list(violations(row))) for row in rows]
    broken = [(row, words) for row, words in broken if words]
    for row, words in broken:
        print(
            f"{row['target']} {row['dtype']} {row['kernel']}, {row['scenario']}: {'; '.join(words)}"
        )
    import triton

    print(
        f"Triton {triton.__version__}: {len(rows)} kernels compiled, {len(broken)} with violations"
    )
    return bool(rows) and not broken


TITLE = "# The Triton kernels, compiled without a GPU"
READ = """
Read from the machine code that Triton {version} compiles ahead of time, without a GPU: `make gpu-static`.
"""
PROMISES = """
A row is a kernel in one configuration and dtype. Guaranteed for each: no spills, no float atomics, shared
memory within the GPU's limit, tensor cores in every loop with a 16-bit product, loads of 128 bits of
wide operands, and no recompilation for another number of tokens. Nothing here ran on a GPU, and no
speed is claimed.
"""
LEGEND = """
Configuration: tile sizes (tokens T, columns D and N, ranks R, experts E), warps and pipeline stages.
Occupancy: share of a multiprocessor's warps, and its limit.  Tensor-core ops and fp32 FMAs: instructions in
loops.  Load bits: the narrowest load of x, dy, A and B; the widest load if a kernel reads none of them.
"""


def cells(row):
    """{column: cell} of a row."""
    return {
        "target": row["target"],
        "kernel": row["kernel"],
        "first launched by": row["scenario"],
        "dtype": row["dtype"],
        "configuration": tile(row["config"]),
        "registers": row["registers"],
        "spills": row["spills"],
        "shared KB": round(row["shared_bytes"] / 1024, 1),
        "occupancy": f"{row['occupancy']:.0%}",
        "limited by": row["limiter"],
        "tensor-core ops": row["tensor_core_ops"] if row["dots"] else "no dot",
        "fp32 FMAs": row["fp32_fmas"],
        "load bits": row["load_bits"],
        "float atomics": row["float_atomics"],
    }


def page(rows):
    """Lines of the page with all rows, violations last."""
    table = report.table([cells(row) for row in rows])
    return [TITLE, _read(), LEGEND.strip(), "", *table, *_broken(rows)]


def summary(rows):
    """Lines of the summary page."""
    found = report.summary([cells(row) for row in rows])
    link = "All rows: [generated/gpu_static.md](generated/gpu_static.md)."
    return [TITLE, _read(), PROMISES.strip(), "", *found, *_broken(rows), "", link]


def _read():
    import triton

    return READ.format(version=triton.__version__)


def _broken(rows):
    broken = [(row, list(violations(row))) for row in rows]
    broken = [(row, words) for row, words in broken if words]
    yield f"\n{len(rows)} kernels and configurations, {len(broken)} with violations."
    for row, words in broken:
        yield f"- {row['target']} {row['dtype']} {row['kernel']}, {row['scenario']}: {'; '.join(words)}"


def tile(config):
    """A short description of a tile, such as T=64 D=64, 8 warps, 3 stages."""
    options = dict(option.split("=") for option in config.split())
    sizes = [f"{name[6:]}={n}" for name, n in options.items() if name.startswith("BLOCK_")]
    return f"{' '.join(sizes)}, {options['num_warps']} warps, {options['num_stages']} stages"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", help=f"default: {','.join(DEFAULT)}; also {', '.join(SMALL)}")
    parser.add_argument("--dtypes", help=f"default: {','.join(DTYPES)}")
    parser.add_argument("--scenarios", default="", help="names, separated by semicolons")
    parser.add_argument("--jobs", type=int, default=2, help="targets compiled at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write all rows")
    parser.add_argument("--summary", type=Path, help="write the extremes of each target and kernel")
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail if a guarantee is violated; unless others are named, each kernel once, bf16, sm_90",
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    scenarios = [name for name in args.scenarios.split(";") if name]
    targets = args.targets.split(",") if args.targets else ["sm_90"] if args.check else DEFAULT
    dtypes = args.dtypes.split(",") if args.dtypes else ["bfloat16"] if args.check else DTYPES
    if args.one:
        compile_for(args.one, dtypes, scenarios)
        return
    if args.check:
        sys.exit(0 if check(rows(targets, dtypes, scenarios or EACH_KERNEL, args.jobs)) else 1)
    found = rows(targets, dtypes, scenarios, args.jobs)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.summary:
        args.summary.write_text("\n".join(summary(found)) + "\n")
    if args.markdown:
        args.markdown.write_text("\n".join(page(found)) + "\n")
    else:
        print("\n".join(page(found)))
