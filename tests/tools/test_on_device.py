"""The suite runs on the requested device and uses a GPU's kernels there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import lora_moe
from lora_moe import backend, ops
from lora_moe import functional as F

from ..support import on_device
from ..support.cases import BY_NAME, sample


class Recorder:
    """Stands in for a GPU's operators: records the calls and returns fixed values on meta."""

    def __init__(self):
        self.names = []

    def __getattr__(self, name):
        def run(*args):
            self.names.append(name)
            assert all(v.device.type == "meta" for v in args if isinstance(v, torch.Tensor))
            return tuple(torch.full((2, 3), 7.0, device="meta") for _ in range(2))

        return run


def test_the_requested_backend_runs():
    asked = on_device.requested()
    assert not asked or lora_moe.backend_info()["serving"]["cpu"] == asked


def test_operators_on_cpu_tensors_run_on_the_device(monkeypatch):
    """On meta: the call reaches the device, and its results are on meta as well."""
    monkeypatch.setitem(backend._serving, "cpu", "reference")
    recorder = Recorder()
    with torch.library._scoped_library("lora_moe", "IMPL") as library:
        on_device.serve_cpu_tensors(library, "triton", device="meta", operators=recorder)
        assert backend.serving("cpu") == "triton"
        with pytest.raises(NotImplementedError, match="meta tensor"):
            F.shrink(torch.ones(2, 4), torch.ones(3, 4))
    assert recorder.names == ["shrink"]
    assert F.shrink(torch.ones(2, 4), torch.ones(3, 4))[0].tolist() == [[4.0] * 3] * 2


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_every_operator_goes_there_and_comes_back(name):
    """Through a device that is the CPU under another name."""
    seen = []

    def operator(*args):
        seen.append(args)
        return args[0]

    tensor, ids = torch.arange(6.0).view(2, 3), torch.tensor([[0, 1], [1, -1]])
    args = [tensor, None, 3, "softmax", ids, 0, torch.ones(2)]
    got = on_device.there_and_back(name, operator, "cpu")(*args)
    assert torch.equal(got, tensor)
    assert len(seen) == 1
    assert seen[0][1:4] == (None, 3, "softmax")


def test_wrong_ids_still_raise():
    case = BY_NAME["odd"]
    v = sample(case)
    args = [
        v["x"],
        v["lora_A"],
        v["lora_B"],
        None,
        torch.full((case.T, 2), case.E),
        None,
        v["scaling"],
    ]
    with pytest.raises(ValueError, match="indices"):
        on_device.there_and_back("grouped_lora", None, "cpu")(*args)


@pytest.mark.parametrize("serving", ["reference", "cpp"])
def test_a_suite_that_would_test_another_backend_stops(serving, monkeypatch):
    monkeypatch.setenv("LORA_MOE_BACKEND", "triton")
    assert f"LORA_MOE_BACKEND=triton, but {serving} serves" in on_device.wrong_backend(serving)
    assert on_device.wrong_backend("triton") == ""
    monkeypatch.setenv("LORA_MOE_BACKEND", "auto")
    assert on_device.wrong_backend(serving) == ""


PRETEND = """
import os, sys, torch
torch.cuda.is_available = lambda: True
import tests.support.on_device, lora_moe
tests.support.on_device.serve_cpu_tensors = lambda *args: None
os.environ["LORA_MOE_BACKEND"] = sys.argv[1]
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/tools/test_compare.py"]))
"""


@pytest.mark.parametrize("asked", ["reference", "triton"])
def test_pytest_itself_stops(asked):
    """With a GPU but no transfer of CPU tensors to it, Triton's tests would run on the reference."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"LORA_MOE_BACKEND": "reference", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", PRETEND, asked]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if asked == "reference":
        assert done.returncode == pytest.ExitCode.OK, done.stdout
    else:
        assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
        assert "these tests would prove nothing" in done.stderr
