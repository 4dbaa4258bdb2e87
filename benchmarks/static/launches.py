"""Runs the package up to its launches: nothing is computed, and each kernel is compiled for a named GPU.

Tensors are on the meta device, so neither memory nor a GPU is needed, values cannot be read, and autograd
works as usual.  The operators go to the Triton launchers unchanged; only the driver is replaced by one
that names the target, and a launch by a compilation.  The launches recorded here are those of a user's call.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.jit import JITFunction

from lora_moe import backend, triton_kernels

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)} | {
    arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942", "gfx950")
}

if triton.knobs.runtime.interpret:
    raise ImportError("unset TRITON_INTERPRET: kernels are compiled here, not interpreted")
# of the GPU that stands for an architecture: A100, RTX 3090 Ti, RTX 4090, H100, B200, RTX 5090, MI250X, …
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170} | {
    "gfx90a": 110, "gfx942": 304, "gfx950": 256,
}  # fmt: skip
backend._serving["meta"] = "triton"


class Launch(NamedTuple):
    """A Triton launch: what was compiled, or why it was not; arguments by name; configuration; grid."""

    name: str
    kernel: Any
    args: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]


class Operator(NamedTuple):
    """A PyTorch operator and its arguments."""

    func: Any
    args: tuple
    result: Any


class Driver:
    """Names a target, without a device."""

    def __init__(self, target):
        self.target, self.utils = target, self

    def get_device_properties(self, device):
        return {"multiprocessor_count": MULTIPROCESSORS[self.target.arch]}

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def launches(target, *, compiled=True):
    """Yields a list that collects every Launch and Operator, in order."""
    triton.runtime.driver.set_active(Driver(TARGETS[target]))
    for remembered in (triton_kernels.tiles.family, triton_kernels.grids.multiprocessors):
        remembered.cache_clear()
    run, seen = JITFunction.run, []

    def note(jit, *args, grid, warmup, **options):
        try:
            kernel = run(jit, *args, grid=grid, warmup=True, **options) if compiled else None
        except (CompilationError, RuntimeError) as error:  # raised by the front end or by a pass
            kernel = error
        arguments = dict(flatten(zip(jit.arg_names, args)))
        seen.append(Launch(jit.__name__, kernel, arguments, options, tuple(grid)))

    JITFunction.run = note
    try:
        with Operators(seen):
            yield seen
    finally:
        JITFunction.run = run


class Operators(TorchDispatchMode):
    """Runs our operators through their Triton launchers and records all others."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_moe":
            with self:
                return getattr(triton_kernels, func._opname)(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.seen.append(Operator(func, (*args, *(kwargs or {}).values()), result))
        return result


def flatten(args):
    """A NamedTuple among a kernel's arguments counts as one argument per field."""
    for name, value in args:
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            yield from flatten((f"{name}.{field}", v) for field, v in zip(fields, value))
        else:
            yield name, value
