"""Builds the C++ operators, once for every instruction set; all static facts are in pyproject.toml.

Kernels get their speed from compiler flags, and a wheel must run on any CPU.  So the same sources
become one extension module an instruction set, and lora_moe.backend loads the best that the CPU can
run: no library mixes flags, so no inline function built for one CPU is ever called on another.

Read from the environment:
    LORA_MOE_SKIP_EXT=1         build no C++ operators; =0: a failure to build them is an error
    LORA_MOE_BUILD_ISA=avx2,..  build these instruction sets only, not all of the architecture
    MAX_JOBS=n                  compile n files at a time, not one a core
    CXX, CXXFLAGS, LDFLAGS      as everywhere
"""

import os
import platform
import sys
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISA_FLAGS = {"portable": []}  # the baseline: SSE2 on x86-64, NEON on aarch64
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS |= {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
    }

TORCH_TARGET_VERSION = "0x020a000000000000"  # stable ABI: what is built here loads in torch >= 2.10
SOURCES = ["csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
SKIP = os.environ.get("LORA_MOE_SKIP_EXT")


def warn(reason: str) -> None:
    """The package works without its C++ operators, so their absence is told and is no error."""
    print(
        f"\n*** lora-moe: C++ operators not built: {reason}"
        "\n*** lora-moe: installing without them; `lora-moe info` tells what serves instead\n",
        file=sys.stderr,
    )


def extension(isa: str) -> Extension:
    import pybind11
    from torch.utils import cpp_extension

    return Extension(
        f"lora_moe._C_{isa}",
        SOURCES,
        depends=["setup.py", *HEADERS],
        include_dirs=[pybind11.get_include()],  # -I: found before torch's own copy
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu", "c10"],
        extra_compile_args=[
            *(arg for path in cpp_extension.include_paths() for arg in ("-isystem", path)),
            f"-DLORA_MOE_ISA={isa}",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            *("-std=c++20", "-fvisibility=hidden", "-ffp-contract=off"),
            *("-Wall", "-Wno-uninitialized"),  # GCC 12 warns of its own AVX-512 header
            *ISA_FLAGS[isa],
        ],
        language="c++",
        optional=SKIP != "0",
    )


def extensions() -> list[Extension]:
    if SKIP == "1":
        warn("LORA_MOE_SKIP_EXT=1")
        return []
    chosen = os.environ.get("LORA_MOE_BUILD_ISA")
    try:
        return [extension(isa) for isa in (chosen.split(",") if chosen else ISA_FLAGS)]
    except ImportError as error:
        if SKIP == "0":
            raise
        warn(f"{error} (the build needs torch and pybind11: try --no-build-isolation)")
        return []


class BuildOperators(build_ext):
    """Compiles an extension's files in parallel, and only those that are out of date."""

    def build_extensions(self):
        from pybind11.setup_helpers import ParallelCompile

        self.object_root, self.failures = self.build_temp, []
        with ParallelCompile("MAX_JOBS", needs_recompile=is_stale):
            super().build_extensions()
        if self.failures:
            warn("\n***   ".join(["", *self.failures]))

    def build_extension(self, ext):
        self.build_temp = f"{self.object_root}/{ext.name}"  # each set of flags its own objects
        ext.extra_compile_args += ["-O1", "-g", "-UNDEBUG"] if self.debug else ["-O3", "-g0"]
        try:
            super().build_extension(ext)
        except Exception as error:
            self.failures.append(f"{ext.name}: {error}")
            raise


def is_stale(obj: str, src: str) -> bool:
    built = os.stat(obj).st_mtime
    return any(os.stat(path).st_mtime > built for path in (src, "setup.py", *HEADERS))


# The kernels' folder must not become a top-level package: `triton_kernels` is another project.
setup(
    packages=[
        *find_packages(include=["lora_moe", "lora_moe.*"]),
        *(f"lora_moe.{p}" for p in find_packages(include=["triton_kernels", "triton_kernels.*"])),
    ],
    package_dir={"lora_moe.triton_kernels": "triton_kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildOperators},
)
