"""Builds the C++ operators, once per instruction set; all static metadata is in pyproject.toml.

The kernels need compiler flags to be fast, but a wheel must run on any CPU.  So the same sources become
one extension module per instruction set, and lora_moe.backend loads the best one that the CPU supports.
No library mixes flags, so no inline function built for one CPU is ever called on another.

Environment variables:
    LORA_MOE_SKIP_EXT=1         do not build the C++ operators; =0: fail if they cannot be built
                                (unset: if they fail, install without them; `lora-moe info` shows the reason)
    LORA_MOE_BUILD_ISA=avx2,..  build only these of the architecture's instruction sets
    LORA_MOE_BUILD_CUDA=1       also build the CUDA kernels, with nvcc; fail if a component is missing
    TORCH_CUDA_ARCH_LIST=8.0;.. build them for these architectures; CUDA_HOME is the toolkit's folder
    MAX_JOBS=n                  compile n files at a time instead of one per core
    CXX, CXXFLAGS, LDFLAGS      as usual
An empty variable counts as unset.
"""

import json
import os
import platform
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

if int(setuptools.__version__.split(".")[0]) < 77:  # older versions cannot read pyproject.toml
    sys.exit(
        f"lora-moe: expected setuptools 77 or newer, got {setuptools.__version__};"
        ' type: pip install "setuptools>=77"'
    )

sys.path.insert(0, str(Path(__file__).parent))
import setup_cuda as toolchain

VARIABLES = (
    *("LORA_MOE_SKIP_EXT", "LORA_MOE_BUILD_ISA", "LORA_MOE_BUILD_CUDA", "MAX_JOBS"),
    *(
        "TORCH_CUDA_ARCH_LIST",
        "CUDA_HOME",
        "CUDA_PATH",
        "CC",
        "CXX",
        "CFLAGS",
        "CXXFLAGS",
        "LDFLAGS",
    ),
)
for name in VARIABLES:
    if not os.environ.get(name, "").strip():
        os.environ.pop(name, None)

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS = {"portable": []}  # the baseline: SSE2 on x86-64, NEON on aarch64
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS |= {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
    }

TORCH_TARGET_VERSION = "0x020a000000000000"  # stable ABI: a build loads in any torch >= 2.10
SOURCES = ["csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
KERNELS = sorted(glob("csrc/cuda/*.cu"))
SKIP = os.environ.get("LORA_MOE_SKIP_EXT")
BUILD_CUDA = os.environ.get("LORA_MOE_BUILD_CUDA", "0") == "1"
NOTE = "_not_built.json"  # {instruction set: reason}, read by lora_moe.missing_operators
not_built: dict[str, str] = {}


def warn(reason: str, isas=ISA_FLAGS) -> None:
    """Prints the reason; the package works without its C++ operators, so this is no error."""
    not_built.update(dict.fromkeys(isas, reason))
    print(
        f"\n*** lora-moe: C++ operators not built: {reason}"
        "\n*** lora-moe: installing without them; `lora-moe info` tells what serves instead\n",
        file=sys.stderr,
    )


def leave_note(folder: Path) -> None:
    """Saves the reasons where the operators would be: pip hides the output of a build that succeeds."""
    (folder / NOTE).unlink(missing_ok=True)
    if not_built and folder.is_dir():
        (folder / NOTE).write_text(json.dumps(not_built, indent=1) + "\n")


def stop(reason: str):
    sys.exit(f"lora-moe: {reason}")


def check_variables() -> None:
    for name in ("LORA_MOE_SKIP_EXT", "LORA_MOE_BUILD_CUDA"):
        if os.environ.get(name, "0") not in ("0", "1"):
            stop(f"{name}: expected 0 or 1, got {os.environ[name]!r}")
    jobs = os.environ.get("MAX_JOBS", "1")
    if not re.fullmatch("0*[1-9][0-9]*", jobs):
        stop(f"MAX_JOBS: expected a positive number, got {jobs!r}")
    isas = os.environ.get("LORA_MOE_BUILD_ISA")
    if isas and not set(isas.split(",")) <= ISA_FLAGS.keys():
        stop(f"LORA_MOE_BUILD_ISA: expected some of {','.join(ISA_FLAGS)}, got {isas!r}")


def extension(isa: str) -> Extension:
    import pybind11
    from torch.utils import cpp_extension

    return Extension(
        f"lora_moe._C_{isa}",
        SOURCES,
        depends=["setup.py", *headers("csrc/cpu")],
        include_dirs=[pybind11.get_include()],  # -I takes precedence over torch's own copy
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu", "c10"],
        extra_compile_args=[
            *(arg for path in cpp_extension.include_paths() for arg in ("-isystem", path)),
            f"-DLORA_MOE_ISA={isa}",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            *("-std=c++20", "-fvisibility=hidden", "-ffp-contract=off"),
            *("-Wall", "-Wno-uninitialized"),  # GCC 12 warns about its own AVX-512 header
            *ISA_FLAGS[isa],
        ],
        language="c++",
        optional=SKIP != "0",
    )


def headers(folder: str) -> list[str]:
    """The headers that files in a folder may include."""
    return sorted({*glob("csrc/*.h"), *glob(f"{folder}/*.h")})


def cuda_extension() -> Extension:
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        toolchain.stop(f"{error} (the build needs torch and pybind11: try --no-build-isolation)")
    nvcc = toolchain.find_nvcc()
    if torch.version.cuda is None:
        toolchain.stop(f"torch {torch.__version__} has no CUDA; install a CUDA build of torch")
    if torch.version.cuda.split(".")[0] != toolchain.release(nvcc).split(".")[0]:
        toolchain.stop(
            f"nvcc {toolchain.release(nvcc)} does not fit torch {torch.__version__}, built for CUDA"
            f" {torch.version.cuda}; set CUDA_HOME to that toolkit"
        )
    toolkit = nvcc.parents[1]
    library_dirs = [str(p) for p in (toolkit / "lib64", toolkit / "lib") if p.is_dir()]
    extension = Extension(
        "lora_moe._C_cuda",
        sorted(glob("csrc/cuda/*.cpp")),
        depends=["setup.py", *headers("csrc/cuda")],
        include_dirs=[pybind11.get_include(), str(toolkit / "include")],
        library_dirs=[*cpp_extension.library_paths(), *library_dirs],
        libraries=["torch_cuda", "torch_cpu", "c10", "cudart_static", "rt", "dl", "pthread"],
        extra_compile_args=[
            *(arg for path in cpp_extension.include_paths() for arg in ("-isystem", path)),
            f"-DLORA_MOE_CUDA_ARCHS={';'.join(toolchain.archs(nvcc))}",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            *("-DUSE_CUDA", "-std=c++20", "-fvisibility=hidden", "-Wall"),
        ],
        language="c++",
    )
    extension.nvcc = [
        nvcc,
        *(flag for arch in toolchain.archs(nvcc) for flag in toolchain.code_flags(arch)),
    ]
    return extension


def extensions() -> list[Extension]:
    return [*cpu_extensions(), *([cuda_extension()] if BUILD_CUDA else [])]


def cpu_extensions() -> list[Extension]:
    if SKIP == "1":
        warn("LORA_MOE_SKIP_EXT=1 was set")
        return []
    chosen = os.environ.get("LORA_MOE_BUILD_ISA")
    try:
        return [extension(isa) for isa in (chosen.split(",") if chosen else ISA_FLAGS)]
    except ImportError as error:
        if SKIP == "0":
            raise
        warn(f"{error} (the build needs torch and pybind11: try --no-build-isolation)")
        return []


class BuildPython(build_py):
    def run(self):
        super().run()
        leave_note(Path("lora_moe") if self.editable_mode else Path(self.build_lib, "lora_moe"))


class BuildOperators(build_ext):
    """Compiles an extension's files in parallel, and only if they are out of date."""

    def build_extensions(self):
        from pybind11.setup_helpers import ParallelCompile

        self.object_root, self.failures = self.build_temp, []
        self.compiler.spawn = self.compiler.call = Compiler()  # its old and its new name
        with ParallelCompile("MAX_JOBS", needs_recompile=is_stale):
            super().build_extensions()
        if self.failures:
            warn("\n***   ".join(["", *self.failures]), isas=())
        leave_note(Path(self.get_ext_fullpath("lora_moe._")).parent)

    def build_extension(self, ext):
        self.build_temp = f"{self.object_root}/{ext.name}"  # separate objects per extension
        if hasattr(ext, "nvcc"):
            ext.extra_objects = self.compile_kernels(ext)
        ext.extra_compile_args += ["-O1", "-g", "-UNDEBUG"] if self.debug else ["-O3", "-g0"]
        try:
            super().build_extension(ext)
        except Exception as error:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # from an older build
            not_built[ext.name.removeprefix("lora_moe._C_")] = str(error)
            self.failures.append(f"{ext.name}: {error}")
            raise

    def compile_kernels(self, ext) -> list[str]:
        """The objects of the .cu files, in parallel, as nvcc compiles one architecture after another."""
        flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-c"]
        os.makedirs(self.build_temp, exist_ok=True)

        def compile_kernel(source):
            target = f"{self.build_temp}/{Path(source).stem}.cu.o"
            if not os.path.exists(target) or is_stale(target, source):
                subprocess.run([*ext.nvcc, *flags, source, "-o", target], check=True)
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
            return list(pool.map(compile_kernel, KERNELS))


class Compiler:
    """Runs compiler commands, several at a time; errors quote the compiler's first error."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, command, **_):
        program = os.path.basename(command[0])
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            raise CompileError(f"{program} does not run ({error.strerror}: {command[0]})") from None
        said = done.stdout.decode(errors="replace")
        with self.lock:
            sys.stderr.write(said)
        if done.returncode:
            lines = [line.strip() for line in said.splitlines() if line.strip()]
            errors = [line for line in lines if re.search("error|cannot|undefined", line)]
            first = (errors or lines or [f"ended with status {done.returncode}"])[0]
            raise CompileError(f"{program}: {first[:300]}")


def is_stale(obj: str, src: str) -> bool:
    built = os.stat(obj).st_mtime
    used = (src, "setup.py", *headers(os.path.dirname(src)))
    return any(os.stat(path).st_mtime > built for path in used)


check_variables()
# `triton_kernels` is another project, so the kernels' folder must not become a top-level package.
setup(
    packages=[
        *find_packages(include=["lora_moe", "lora_moe.*"]),
        *(f"lora_moe.{p}" for p in find_packages(include=["triton_kernels", "triton_kernels.*"])),
    ],
    package_dir={"lora_moe.triton_kernels": "triton_kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOperators, "build_py": BuildPython},
)
