"""Common to all Triton launchers: fp32 precision, tuning, tables written on the device."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys

import pytest
import torch

from ..support.interpreter import Sanitizer, interpreting

pytest.importorskip("triton")
INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
with interpreting() if INTERPRETED else contextlib.nullcontext():
    launching = importlib.import_module("lora_moe.triton_kernels.launching")
    table_file = importlib.import_module("lora_moe.triton_kernels.write_table")
    expand_file = importlib.import_module("lora_moe.triton_kernels.expand")

SWITCHES = {  # settings by a user, and the resulting precision
    "pass": "ieee",
    "matmul.allow_tf32 = True": "tf32",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "matmul.fp32_precision = 'tf32'": "tf32",
    "matmul.fp32_precision = 'ieee'": "ieee",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "matmul.fp32_precision = 'tf32'; torch.backends.cudnn.conv.fp32_precision = 'ieee'": "tf32",
}


def precision_after(switch, target="sm_90"):
    """Runs in a new process: PyTorch remembers which of its switches were used."""
    code = f"""
import torch
from benchmarks.static.launches import TARGETS, Driver, triton
from lora_moe.triton_kernels.launching import precision
triton.runtime.driver.set_active(Driver(TARGETS[{target!r}]))
matmul = torch.backends.cuda.matmul
{switch}
print(precision(torch.empty(2, 2, device="meta")))
"""
    return in_a_process(code)


def in_a_process(code):
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = kept | {"LORA_MOE_BACKEND": "reference"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("switch", SWITCHES)
def test_fp32_precision_follows_each_of_pytorchs_switches(switch):
    if "fp32_precision" in switch and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has only the older switch")
    assert precision_after(switch) == SWITCHES[switch]


@pytest.mark.parametrize("arch", ["gfx1100", "gfx1201"])
def test_waves_of_32_threads_are_refused(arch):
    """With the other GPUs' tiles they would spill thousands of registers; plain PyTorch runs instead."""
    code = f"""
import warnings
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources
from benchmarks.static.launches import Driver, triton
from lora_moe import backend, triton_kernels
triton.runtime.driver.set_active(Driver(GPUTarget("hip", {arch!r}, 32)))
run = backend._or_reference("shrink", triton_kernels.shrink, OutOfResources)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    s, _ = run(torch.ones(2, 4), torch.ones(3, 4), None)
print(s.tolist() == [[4.0] * 3] * 2, *(w.message for w in said))
"""
    done = in_a_process(code)
    assert done.startswith(
        f"True lora_moe: shrink does not fit this GPU (there are no tiles for {arch}"
    )
    assert "falling back to plain PyTorch" in done


def test_amd_has_no_tf32():
    assert precision_after("matmul.allow_tf32 = True", "gfx942") == "ieee"


def test_autotuning_repeats_for_other_layers_but_not_for_other_t():
    tuned = launching.tuned(expand_file._expand_kernel, 4)
    assert {"D", "R", "BLOCK_T", "BLOCK_D"} <= set(tuned.keys)
    assert "T" not in tuned.keys
    assert len(tuned.configs) > 1


def test_autotuning_never_changes_bits():
    """Tiles and warps change the order of sums and are fixed; only the number of stages varies."""
    for warps in (2, 8):
        configs = launching.tuned(expand_file._expand_kernel, warps).configs
        assert all(not config.kwargs for config in configs)
        assert {config.num_warps for config in configs} == {warps}
        assert len({config.num_stages for config in configs}) == len(configs)


@pytest.mark.parametrize(
    "numbers",
    [
        [0, 4, 12, 28, 52],
        [3],
        [],
        [*range(16, 4000)],
        [*range(16), *range(48, 64), *range(5, 7)],
        [*range(0, 3 * 40, 3)],  # more runs than one launch takes
        [n for start in range(0, 5000, 100) for n in range(start, start + 20)],
        [2**24, 2**24 - 1, 0],
        [0, 0, 1, 1, 0],
    ],
    ids=lambda numbers: f"{len(numbers)} numbers",
)
def test_tables_hold_the_given_numbers(numbers):
    with Sanitizer() if INTERPRETED else contextlib.nullcontext():
        table = table_file.write_table(numbers, torch.empty(1, device=DEVICE))
    assert table.dtype == torch.int32
    assert table.tolist() == numbers


def test_tables_beyond_the_integers_of_fp32_are_refused():
    with pytest.raises(ValueError, match="16777216 rank rows, got 16777217"):
        table_file.write_table([0, 2**24 + 1], torch.empty(1, device=DEVICE))
