"""Compiles csrc/cuda with a C++ compiler against the headers in this folder: CUDA kernels on a CPU.

The result is the extension module that nvcc would build; its operators are registered for CUDA tensors,
and run on CPU tensors if they are called without the dispatcher.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lora_moe import ops

ROOT = Path(__file__).parents[3]
SHIM = Path(__file__).parent
FOLDER = ROOT / "build" / "cuda_shim"
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++20", "-O1", "-march=native", "-fPIC", "-fvisibility=hidden", "-Wall", f"-I{SHIM}"]
KERNEL_FLAGS = ["-D__CUDACC__", "-Wno-unknown-pragmas", "-x", "c++"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]


def build(csrc: Path = ROOT / "csrc", sanitize: bool = False) -> Path:
    """The module built from csrc/cuda; builds of the same sources are reused."""
    kernels, hosts = sorted((csrc / "cuda").glob("*.cu")), sorted((csrc / "cuda").glob("*.cpp"))
    runtime = sorted(SHIM.glob("*.cpp"))
    flags = SANITIZERS if sanitize else []
    commands = [
        *((source, [*FLAGS, *flags, *KERNEL_FLAGS]) for source in kernels),
        *((source, [*FLAGS, *_torch_flags()]) for source in hosts),
        *((source, [*FLAGS, *flags, *_torch_flags()]) for source in runtime),
    ]
    headers = [*(csrc / "cuda").glob("*.h"), *csrc.glob("*.h"), *SHIM.glob("*.h")]
    text = b"".join(path.read_bytes() for path in sorted(headers))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes wait for the first
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(lambda c: _object(*c, text), commands))
        return _link(objects, flags)


def _torch_flags():
    import pybind11
    from torch.utils import cpp_extension

    return [
        *(f"-isystem{p}" for p in [*cpp_extension.include_paths(), pybind11.get_include()]),
        f"-isystem{sysconfig.get_paths()['include']}",
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DLORA_MOE_CUDA_ARCHS=none"),
    ]


def _object(source, flags, headers):
    target = FOLDER / f"{_name(source.read_bytes(), headers, *flags)}.o"
    if not target.exists():
        _run(COMPILER, *flags, "-c", source, "-o", target.with_suffix(".tmp"))
        target.with_suffix(".tmp").rename(target)
    return target


def _link(objects, flags):
    from torch.utils import cpp_extension

    target = FOLDER / _name(*objects) / "_C_cuda.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        libraries = [f"-L{p}" for p in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
        _run(COMPILER, "-shared", *flags, "-o", target.with_suffix(".tmp"), *objects, *libraries)
        target.with_suffix(".tmp").rename(target)
    return target


def _name(*parts):
    parts = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    return hashlib.sha256(b"|".join([torch.__version__.encode(), *parts])).hexdigest()[:16]


def _run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr}")


class Kernels:
    """The operators of a built module, by name, for CPU tensors."""

    def __init__(self, path: Path):
        spec = importlib.util.spec_from_file_location("_C_cuda", path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.module.register_operators()
        self.shim = ctypes.CDLL(str(path))

    def __getattr__(self, name):
        assert name in ops.SCHEMAS, name
        operator = getattr(torch.ops.lora_moe, name).default
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        return lambda *args: operator.redispatch(keys, *args)

    def skip_barrier(self, file: str = "", line: int = 0):
        """Skips the barrier at this line of a source; without arguments, skips none."""
        self.skipped = file.encode()  # kept alive: the shim holds the pointer
        self.shim.cuda_shim_skip_barrier(self.skipped, line)
