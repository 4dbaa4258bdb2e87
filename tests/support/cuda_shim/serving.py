"""A pytest plugin: the public functions on CPU tensors run the CUDA kernels, compiled for the CPU.

    python -m pytest -p tests.support.cuda_shim.serving tests/public/test_gradients.py -k "not float64"

The kernels do not take float64.
"""

from __future__ import annotations

import warnings

import torch

from ..on_device import serve_cpu_tensors
from .build import Kernels, build


def pytest_configure(config):
    config.cuda_shim = torch.library.Library("lora_moe", "IMPL")  # kept alive during the run
    with warnings.catch_warnings(action="ignore"):  # of kernels that are overridden
        serve_cpu_tensors(config.cuda_shim, "cuda", "cpu", Kernels(build()))
