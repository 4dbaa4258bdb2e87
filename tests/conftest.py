"""Runs before anything imports triton: without a GPU, its kernels are interpreted.

LORA_MOE_BACKEND=triton runs the public functions on these kernels; the tests of the kernels always use them.
With a GPU, LORA_MOE_BACKEND=triton or cuda runs the public functions on it.
"""

import os
import signal
import sys
from pathlib import Path

# before numpy: with a second thread the interpreter's small matrix products take a hundred times as long
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# kernels of some cores sum a row in another order according to where in the tile it lies
os.environ["OPENBLAS_CORETYPE"] = (
    "SkylakeX"
    if any("avx512f" in info.read_text() for info in Path("/proc").glob("cpuinfo"))
    else "Prescott"
)

import importlib.util

import pytest
import torch

from .support import interpreter, on_device

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    if os.environ.get("LORA_MOE_BACKEND") == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    with interpreter.interpreting():
        import triton.experimental.gluon  # noqa: F401  the first launch imports this

    interpreter.quicken()

# a shell starts background jobs with this ignored, and tests interrupt the processes that they start
signal.signal(signal.SIGINT, signal.default_int_handler)

# torch.empty is filled with NaN; this, too, imports triton
torch.use_deterministic_algorithms(True, warn_only=True)

if torch.cuda.is_available() and on_device.requested() in on_device.GPU_BACKENDS:
    library = torch.library.Library("lora_moe", "IMPL")  # held for as long as the process lives
    on_device.serve_cpu_tensors(library, on_device.requested())


# run in a separate environment: make test-vllm
collect_ignore = [] if os.environ.get("LORA_MOE_VLLM") else ["stack/vllm"]


def pytest_sessionstart(session):
    """Fails if the suite would test another backend than the requested one."""
    import lora_moe

    if reason := on_device.wrong_backend(lora_moe.backend_info()["serving"]["cpu"]):
        raise pytest.UsageError(reason)


def pytest_collection_modifyitems(config, items):
    """Skips tests that take minutes unless this is a nightly run."""
    if os.environ.get("LORA_MOE_NIGHTLY"):
        return
    left = [item for item in items if item.get_closest_marker("nightly")]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


@pytest.fixture(autouse=True)
def compiles_anew():
    """torch.compile limits recompilations per function, over all tests of a process."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()
