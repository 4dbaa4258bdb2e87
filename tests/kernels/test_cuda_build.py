"""The CUDA build: the machine code of nvcc, messages for missing pieces, checks that can fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_moe import backend_info

from ..support.cuda_shim import build
from ..support.cuda_shim.planted_bugs import UNSEEN, barriers, masks

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
needs_compiler = pytest.mark.skipif(
    shutil.which(build.COMPILER) is None or sys.platform != "linux", reason="needs a C++ compiler"
)


@needs_nvcc
@pytest.mark.parametrize("target", ["sm_75", "sm_80"])  # without and with bf16 tensor cores
def test_machine_code(target):
    """No warnings, spills or float atomics; tensor cores and 128-bit loads are used.

    `python -m benchmarks.cuda_static` checks all architectures.
    """
    cuda_static = pytest.importorskip("benchmarks.static.cuda_static")
    rows = cuda_static.rows([target])
    assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}
    assert {*cuda_static.MATMULS} <= {row["kernel"] for row in rows}
    broken = [
        (row["kernel"], row["config"], why) for row in rows for why in cuda_static.violations(row)
    ]
    assert broken == []


def test_violations_are_found():
    cuda_static = pytest.importorskip("benchmarks.static.cuda_static")
    good = {
        "kernel": "wgrad_kernel", "config": "", "dtype": "bfloat16", "spills": 0, "float_atomics": 0,
        "shared_bytes": 1, "shared_limit": 1, "load_bits": 128, "tensor_core_ops": 1,
        "fp32_fmas": 36, "target": "sm_80",
    }  # fmt: skip
    assert list(cuda_static.violations(good)) == []
    for bad in (
        {"spills": 1}, {"float_atomics": 1}, {"shared_bytes": 2}, {"load_bits": 64}, {"tensor_core_ops": 0},
        {"fp32_fmas": 64},
    ):  # fmt: skip
        assert len(list(cuda_static.violations(good | bad))) == 1


@needs_compiler
def test_missing_masks_and_barriers_are_seen():
    """Sanitizers report each removed mask or barrier, and nothing on the unchanged kernels.

    Every 128th mask and barrier is removed here, all of them in `make nightly`.
    """
    step = 1 if os.environ.get("LORA_MOE_NIGHTLY") else 128
    found = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    libraries = [done.stdout.strip() for done in found]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("needs gcc's sanitizers")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "LORA_MOE_BACKEND": "reference",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.cuda_shim.planted_bugs", "--step", str(step)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (nothing, silent), *bugs = map(json.loads, done.stdout.splitlines())
    assert nothing == "nothing"
    assert silent
    every = len(masks(ROOT / "csrc")) + len(barriers(ROOT / "csrc"))
    assert len(bugs) == -(-every // step)
    unseen = {re.sub(r":\d+:", ":", name) for name, seen in bugs if not seen}
    assert unseen <= set(UNSEEN)
    assert step > 1 or unseen == set(UNSEEN)


def build_cuda(**environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORA_MOE", "CUDA", "TORCH"))}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=ROOT, capture_output=True, text=True,
        env=kept | {"LORA_MOE_SKIP_EXT": "1", "LORA_MOE_BUILD_CUDA": "1"} | environment,
    )  # fmt: skip
    assert done.returncode != 0
    return done.stderr.splitlines()[-1]


def test_no_nvcc(tmp_path):
    assert build_cuda(CUDA_HOME=str(tmp_path)) == (
        f"LORA_MOE_BUILD_CUDA=1: no nvcc in {tmp_path}/bin; set CUDA_HOME to a CUDA toolkit"
    )


def test_nvcc_of_another_version(tmp_path):
    """torch was built for CUDA 13.0, but the nvcc in PATH is 12.8."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    (tmp_path / "sitecustomize.py").write_text("import torch\ntorch.version.cuda = '13.0'\n")
    path = f"{nvcc.parent}:{os.environ['PATH']}"
    assert build_cuda(PATH=path, PYTHONPATH=str(tmp_path)) == (
        f"LORA_MOE_BUILD_CUDA=1: nvcc 12.8 does not fit torch {torch.__version__}, built for CUDA 13.0;"
        " set CUDA_HOME to that toolkit"
    )


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is not None, reason="of a torch without CUDA")
def test_torch_without_cuda():
    assert build_cuda() == (
        f"LORA_MOE_BUILD_CUDA=1: torch {torch.__version__} has no CUDA; install a CUDA build of torch"
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="of a torch without CUDA")
def test_info_says_why_not():
    state = backend_info()["backends"]["cuda"]
    assert not state["available"]
    assert re.search(
        "build with LORA_MOE_BUILD_CUDA=1|LORA_MOE_BACKEND=|failed to load", state["reason"]
    )
