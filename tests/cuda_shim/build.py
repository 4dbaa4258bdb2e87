"""Compiles csrc/cuda with a C++ compiler against the headers of this folder: CUDA kernels on a CPU.

The result is the same extension module that nvcc's build makes; its operators, registered for CUDA
tensors, run on CPU tensors when they are called past the dispatcher.
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

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parent
FOLDER = ROOT / "build" / "cuda_shim"
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++20", "-O1", "-march=native", "-fPIC", "-fvisibility=hidden", "-Wall", f"-I{SHIM}"]
KERNEL_FLAGS = ["-D__CUDACC__", "-Wno-unknown-pragmas", "-x", "c++"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]


def build(csrc: Path = ROOT / "csrc", sanitize: bool = False) -> Path:
    """The module built from csrc/cuda; built before, from the same sources, it is used again."""
    cuda = csrc / "cuda"
    sources = sorted([*cuda.iterdir(), csrc / "tensors.h", *SHIM.iterdir()])
    content = b"".join(p.read_bytes() for p in sources if p.is_file())
    name = hashlib.sha256(content + torch.__version__.encode() + bytes([sanitize])).hexdigest()[:16]
    module = FOLDER / name / "_C_cuda.so"
    module.parent.mkdir(parents=True, exist_ok=True)
    with open(module.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes wait for the first
        if not module.exists():
            _compile(cuda, module, SANITIZERS if sanitize else [])
    return module


def _compile(cuda, module, sanitizers):
    import pybind11
    from torch.utils import cpp_extension

    torch_flags = [
        *(f"-isystem{p}" for p in [*cpp_extension.include_paths(), pybind11.get_include()]),
        f"-isystem{sysconfig.get_paths()['include']}",
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DLORA_MOE_CUDA_ARCHS=none"),
    ]
    kernels, hosts = sorted(cuda.glob("*.cu")), sorted([*cuda.glob("*.cpp"), *SHIM.glob("*.cpp")])
    commands = {p: [*sanitizers, *KERNEL_FLAGS] for p in kernels}
    commands |= {p: [*torch_flags, *(sanitizers if p.parent == SHIM else [])] for p in hosts}

    def compile_one(source):
        target = module.parent / f"{source.name}.o"
        _run(COMPILER, *FLAGS, *commands[source], "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, commands))
    libraries = [f"-L{p}" for p in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    unfinished = module.with_suffix(".tmp")
    _run(COMPILER, "-shared", *sanitizers, "-o", unfinished, *objects, *libraries)
    unfinished.rename(module)


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
        operator = getattr(torch.ops.lora_moe, name).default
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        return lambda *args: operator.redispatch(keys, *args)

    def skip_barrier(self, file: str = "", line: int = 0):
        """Leave out the barrier at this line of a source; without one, none."""
        self.skipped = file.encode()  # kept alive: the shim holds the pointer
        self.shim.cuda_shim_skip_barrier(self.skipped, line)
