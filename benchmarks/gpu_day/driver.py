"""The checks for the first day with a GPU: verifies the kernels on it and reports failures.

    python -m benchmarks.gpu_day [--dry-run] [--stages a,b] [--out DIR]          (make check-gpu)

Each stage (stages.py) runs in its own process with a timeout and prints its findings as it
goes; DIR/report.md is rewritten after every stage.  A run ends within nine minutes, and the next run
continues: stages that passed are not repeated unless they are named.  Nothing is installed and no network is
needed.  --dry-run runs all stages at small sizes, with Triton's interpreter in place of the device.

Exit status: 0 if everything passed, 1 if something is wrong, 2 if stages remain (run again), 3 if there
is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
CALL_S = 9 * 60
NO_GPU = (
    "no GPU that this PyTorch can use: run this where torch.cuda.is_available() is true,"
    " or use --dry-run to run the stages without one"
)
NO_TORCH = (
    f"{sys.executable} has no PyTorch: name the Python that has one,"
    " as in `make check-gpu PYTHON=/path/to/python`"
)


class Stage(NamedTuple):
    name: str
    seconds: int  # timeout
    proves: str
    backend: str = "triton"


STAGES = [
    Stage("environment", 60, "versions, tools, and which kernels serve the device", "auto"),
    Stage("compile", 180, "every kernel compiles for this GPU; later stages use the cache"),
    Stage(
        "tiles",
        180,
        "tiles for thousands of tokens, every plan, compared with fp64; the same bits twice",
    ),
    Stage("tests-triton", 300, "kernels and public functions of the Triton backend, on the GPU"),
    Stage("build-cuda", 240, "nvcc builds the CUDA kernels for this GPU", "auto"),
    Stage("tests-cuda", 240, "the public functions of the CUDA backend, on the GPU", "cuda"),
    Stage("sanitizer", 240, "no out-of-bounds access, no race, no uninitialized read"),
    Stage(
        "graphs", 120, "CUDA graphs and torch.compile, also with unequal ranks and frozen experts"
    ),
    Stage("bench", 300, "times in a graph, next to the base matmul and stacked matmuls", "auto"),
    Stage("traffic", 180, "bytes counted by Nsight Compute, compared with the accounting", "auto"),
    Stage("train", 180, "a step of four Llama-7B-shaped blocks: time and peak memory", "auto"),
    Stage("doctor", 120, "lora-moe doctor, as a user runs it", "auto"),
]


def run(stage, out, dry_run, limit):
    """{"seconds", "findings"}: the findings printed before the stage ended or was stopped."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "LORA_MOE_BACKEND": stage.backend,
    }
    if dry_run:
        backend = "triton" if stage.backend in ("triton", "cuda") else "auto"
        environment |= {
            "LORA_MOE_BACKEND": backend,
            "LORA_MOE_DRY_RUN": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        environment |= {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
    command = [sys.executable, "-u", "-m", "benchmarks.gpu_day.stages", stage.name]
    log, start = out / f"{stage.name}.log", time.monotonic()
    with open(log, "w") as said, open(out / f"{stage.name}.jsonl", "w") as findings:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=findings, stderr=said, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    found = read_findings(out / f"{stage.name}.jsonl")
    if status is None:
        found.append(
            finding("finished in time", False, f"stopped after {limit:.0f} s; see {log.name}")
        )
    elif status:
        last = log.read_text().strip().splitlines()[-1:] or [f"exit status {status}"]
        found.append(finding("ran to completion", False, f"{last[0]} ({log.name})"))
    elif not found:
        found.append(finding("reported findings", False, f"printed no finding; see {log.name}"))
    return {"seconds": round(time.monotonic() - start, 1), "findings": found}


def finding(what, ok, detail=""):
    """ok: True, False, or None for a fact that is not a check."""
    return {"what": what, "ok": ok, "detail": detail}


def read_findings(file):
    lines = [line for line in file.read_text().splitlines() if line.startswith("{")]
    return [json.loads(line) for line in lines if line.endswith("}")]


def wrong(result):
    return [f for f in result["findings"] if f["ok"] is False]


def report(results, dry_run):
    """Markdown lines: failures first, then one line per stage, then all findings."""
    kind = "a dry run without one, which is no evidence" if dry_run else "results"
    yield f"# lora-moe on a GPU: {kind}\n"
    failures = [(name, f) for name, result in results.items() for f in wrong(result)]
    for name, f in failures:
        yield f"- **failed** in {name}: {f['what']}: {f['detail']}"
    if not failures:
        yield "All checks passed in the stages that ran."
    yield "\n| stage | proves | seconds | result |\n|---|---|---:|---|"
    for stage in STAGES:
        result = results.get(stage.name)
        told = f"{result['seconds']} | {verdict(result)}" if result else "| not run yet"
        yield f"| {stage.name} | {stage.proves} | {told} |"
    for name, result in results.items():
        yield f"\n## {name}\n\n| finding | | |\n|---|---|---|"
        for f in result["findings"]:
            mark = {True: "passed", False: "**failed**", None: ""}[f["ok"]]
            yield f"| {f['what']} | {mark} | {f['detail'].replace('|', '/')} |"


def verdict(result):
    failed, checked = len(wrong(result)), sum(f["ok"] is not None for f in result["findings"])
    if failed:
        return f"{failed} of {checked} failed"
    return "1 check passed" if checked == 1 else f"{checked} checks passed"


def chosen(names, results):
    """Stages to run: those named, or those that have not passed yet."""
    unknown = set(names) - {stage.name for stage in STAGES}
    if unknown:
        known = ", ".join(stage.name for stage in STAGES)
        raise SystemExit(f"--stages: expected some of {known}, got {', '.join(sorted(unknown))}")
    passed = {name for name, result in results.items() if not wrong(result)}
    return [s for s in STAGES if (s.name in names if names else s.name not in passed)]


def why_no_gpu():
    """None if there is one."""
    try:
        import torch
    except ImportError:
        return NO_TORCH
    return None if torch.cuda.is_available() else NO_GPU


def main(argv=None):
    parser = argparse.ArgumentParser("benchmarks.gpu_day", description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="small, interpreted, without a GPU")
    parser.add_argument("--stages", default="", help=", ".join(stage.name for stage in STAGES))
    parser.add_argument(
        "--out", type=Path, help="default: build/gpu_day, or build/gpu_day_dry in a dry run"
    )
    args = parser.parse_args(argv)
    if not args.dry_run and (why := why_no_gpu()):
        print(why)
        return 3
    out = args.out or ROOT / "build" / ("gpu_day_dry" if args.dry_run else "gpu_day")
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    end = time.monotonic() + CALL_S
    todo = chosen([name for name in args.stages.split(",") if name], results)
    for n, stage in enumerate(todo):
        left = end - time.monotonic()
        if left < (30 if args.dry_run else min(stage.seconds, CALL_S / 2)):
            print(f"stages left: {len(todo) - n}; run again to continue")
            return 1 if any(map(wrong, results.values())) else 2
        results[stage.name] = run(stage, out, args.dry_run, min(stage.seconds, left))
        kept.write_text(json.dumps(results, indent=1))
        (out / "report.md").write_text("\n".join(report(results, args.dry_run)) + "\n")
        print(
            f"{stage.name}: {verdict(results[stage.name])}, {results[stage.name]['seconds']} s",
            flush=True,
        )
        for f in wrong(results[stage.name]):
            print(f"    wrong: {f['what']}: {f['detail']}", flush=True)
    print(f"the report: {out / 'report.md'}")
    return 1 if any(map(wrong, results.values())) else 0
