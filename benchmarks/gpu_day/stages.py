"""The stages of driver.py, each in its own process: python -m benchmarks.gpu_day.stages NAME

Prints one finding per line, as JSON.  With LORA_MOE_DRY_RUN=1 the same code runs at small sizes on the CPU.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from .driver import ROOT, finding

DRY = os.environ.get("LORA_MOE_DRY_RUN") == "1"
DEVICE = "cpu" if DRY else "cuda"
BLACK_BOX = [f"tests/public/test_{name}.py" for name in (
    "functional", "routing", "top_k", "exactness", "errors", "ops", "ops_arguments")]  # fmt: skip
TRITON = [f"tests/kernels/test_triton_{name}.py" for name in (
    "kernels", "bits", "arguments", "sort", "launching")]  # fmt: skip
TESTS = {  # backend: (test files, the selection for a dry run)
    "triton": ([*TRITON, *BLACK_BOX],
               ["tests/kernels/test_triton_sort.py", "-k", "tile and not past"]),
    "cuda": (BLACK_BOX, ["tests/tools/test_on_device.py", "-k", "wrong_ids or asked"]),
}  # fmt: skip


def tell(what, ok, detail=""):
    print(json.dumps(finding(what, ok, str(detail))), flush=True)


def environment():
    import lora_moe

    for name, value in {"Python": platform.python_version(), "torch": torch.__version__}.items():
        tell(name, None, value)
    for name in ("triton", "numpy", "pytest"):
        there = importlib.util.find_spec(name)
        tell(name, None, importlib.import_module(name).__version__ if there else "not installed")
    for tool in ("nvcc", "ncu", "compute-sanitizer", "nvidia-smi"):
        tell(tool, None, shutil.which(tool) or "not on the PATH")
    if not DRY:
        p = torch.cuda.get_device_properties()
        tell(
            "GPU",
            None,
            f"{p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory >> 30} GiB",
        )
    info = lora_moe.backend_info()
    for name, facts in info["backends"].items():
        tell(f"backend {name}", None, facts["reason"] or "available")
    serving = info["serving"]["cpu" if DRY else "cuda"]
    tell("a kernel backend serves the device", serving != "reference", serving)


def compile_kernels():
    """Runs all scenarios on the device, with one process per core; Triton caches the compiled kernels."""
    parts = 2 if DRY else max(1, min(16, os.cpu_count() or 1))
    command = [sys.executable, "-m", "benchmarks.gpu_day.work", "scenarios"]
    running = {
        n: subprocess.Popen([*command, f"{n}/{parts}"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for n in range(parts)
    }
    done = 0
    for n, process in running.items():
        said, _ = process.communicate()
        done += said.count("\n")
        tell(f"scenarios of process {n}", process.returncode == 0, f"{said.count(chr(10))} ran")
    tell("every scenario ran", done == (2 if DRY else scenario_count()), f"{done}")


def scenario_count():
    from .work import scenario_names

    return len(scenario_names())


def pytest_of(backend):
    files, small = TESTS[backend]
    # without the project's own settings, which may require a newer pytest
    options = ["-q", "-c", os.devnull, f"--rootdir={ROOT}", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *(small if DRY else files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-20_000:], done.stderr[-5_000:], file=sys.stderr)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-200:]]
    tell(f"tests on {backend}", done.returncode == 0, last[0])
    for line in [line for line in done.stdout.splitlines() if line.startswith("FAILED")][:20]:
        tell("test", False, line.removeprefix("FAILED "))


def build_cuda():
    """Builds in the checkout, for this GPU only; a dry run compiles one kernel with the tests' CUDA shim."""
    if DRY:
        from tests.support.cuda_shim import build

        build.FOLDER.mkdir(parents=True, exist_ok=True)
        made = build._object(
            ROOT / "csrc/cuda/router.cu", [*build.FLAGS, *build.KERNEL_FLAGS], b"dry run"
        )
        tell("a CUDA kernel compiles for the CPU", made.exists(), made.name)
        return
    if not shutil.which("nvcc") and "CUDA_HOME" not in os.environ:
        tell("nvcc", None, "not found: the CUDA kernels are skipped")
        return
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {
        "LORA_MOE_BUILD_CUDA": "1",
        "LORA_MOE_SKIP_EXT": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAX_JOBS": str(os.cpu_count()),
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
    tell(f"nvcc builds for {major}.{minor}", done.returncode == 0, done.stderr.strip()[-300:])


def sanitizer():
    """Small calls of every operator under each tool; a dry run uses the sanitizer of the interpreter."""
    work = [sys.executable, "-m", "benchmarks.gpu_day.work", "small"]
    if DRY:
        done = subprocess.run(work, cwd=ROOT, capture_output=True, text=True)
        tell("the interpreter's sanitizer", done.returncode == 0, last_line(done))
        return
    if not shutil.which("compute-sanitizer"):
        tell("compute-sanitizer", None, "not on the PATH: skipped")
        return
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *work]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(done.stdout[-20_000:], file=sys.stderr)
        tell(tool, done.returncode == 0, last_line(done))


def last_line(done):
    return (done.stdout + done.stderr).strip().splitlines()[-1:] or f"exit status {done.returncode}"


METRICS = "dram__bytes_read.sum,dram__bytes_write.sum"
SAMPLE = (  # sample output of ncu, for the dry run
    '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    '"0","_rank_dense_kernel","dram__bytes_read.sum","Mbyte","135.2"\n'
    '"0","_rank_dense_kernel","dram__bytes_write.sum","byte","67,108,864"\n'
)
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def traffic():
    """Checks that a kernel moves little more than its arguments' bytes; caches may make it less."""
    if not DRY and not shutil.which("ncu"):
        tell("ncu", None, "not on the PATH: skipped")
        return
    counted = read_counters(SAMPLE if DRY else profile())
    expected = {"_rank_dense_kernel": 202e6} if DRY else accounting()
    for name, size in counted.items():
        if name in expected:
            ratio = size / expected[name]
            tell(name, ratio < 1.5, f"{size / 1e6:,.1f} MB, {ratio:.2f} times the accounting's")
    tell(
        "kernels that the accounting knows", bool(set(counted) & set(expected)), ", ".join(counted)
    )


def profile():
    command = ["ncu", "--csv", "--metrics", METRICS, "--target-processes", "all"]
    command += [
        "--kernel-name",
        "regex:_kernel$",
        sys.executable,
        "-m",
        "benchmarks.gpu_day.work",
        "layer",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-20_000:], done.stderr[-5_000:], file=sys.stderr)
    return done.stdout


def read_counters(text):
    """Bytes read and written by each kernel in its last launch."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches = {}
    for row in csv.DictReader(lines[start:]):
        value = float(row["Metric Value"].replace(",", "")) * UNITS.get(row["Metric Unit"], 1)
        launches.setdefault((row["Kernel Name"], row["ID"]), []).append(value)
    return {name: sum(values) for (name, _), values in launches.items()}


def accounting():
    command = [sys.executable, "-m", "benchmarks.accounting", "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stderr, file=sys.stderr)
    sides = json.loads(done.stdout)
    return {name: read + written for side in sides.values() for name, read, written, *_ in side}


def doctor():
    command = [sys.executable, "-m", "lora_moe", "doctor"]
    done = subprocess.run(
        [*command, *(["reference"] if DRY else [])], cwd=ROOT, capture_output=True, text=True
    )
    print(done.stdout, done.stderr, file=sys.stderr)
    tell("lora-moe doctor", done.returncode == 0, last_line(done)[0])


STAGES = {
    "environment": environment,
    "compile": compile_kernels,
    "tests-triton": lambda: pytest_of("triton"),
    "build-cuda": build_cuda,
    "tests-cuda": lambda: pytest_of("cuda"),
    "sanitizer": sanitizer,
    "traffic": traffic,
    "doctor": doctor,
}


def main(name):
    if name in STAGES:
        STAGES[name]()
    else:
        work = importlib.import_module(f"benchmarks.gpu_day.{name}")
        work.main(tell, DEVICE, DRY)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(ROOT)))
    main(sys.argv[1])
