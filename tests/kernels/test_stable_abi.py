"""Extensions use only torch's stable C interface, so a build loads in any torch >= 2.10."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parents[2] / "lora_moe"
EXTENSIONS = sorted(PACKAGE.glob("_C_*.so"))
LIBRARIES = [
    path
    for name in (
        "libtorch_cpu.so",
        "libc10.so",
        "libtorch_cuda.so",
        "libc10_cuda.so",
        "libtorch.so",
    )
    if (path := Path(torch.__file__).parent / "lib" / name).exists()
]
STABLE = re.compile(r"(aoti_)?torch_\w+")  # of torch/csrc/stable/c/shim.h and of AOTInductor
pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")


def symbols(path, *options) -> set[str]:
    """Demangled names without symbol versions."""
    command = ["nm", "-D", "-C", *options, path]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {re.sub(r"^[0-9a-f ]*[A-Za-z] ", "", line).split("@")[0] for line in said.splitlines()}


@pytest.fixture(scope="module")
def of_torch():
    return set().union(*(symbols(path, "--defined-only") for path in LIBRARIES))


def unstable(asked: set[str], of_torch: set[str]) -> list[str]:
    """C++ symbols of torch, and C functions of its libraries outside the stable interface."""
    inside = {s for s in asked if re.search(r"\b(at|c10|torch|caffe2)::", s)}
    plain = {s for s in asked & of_torch if re.fullmatch(r"\w+", s) and not STABLE.fullmatch(s)}
    return sorted(inside | plain)


@pytest.mark.skipif(not EXTENSIONS, reason="needs a built extension")
@pytest.mark.parametrize("path", EXTENSIONS, ids=lambda path: path.name.split(".")[0])
def test_extensions_ask_for_stable_symbols_only(path, of_torch):
    asked = symbols(path, "--undefined-only")
    assert any(s.startswith("aoti_torch_") for s in asked & of_torch)
    assert unstable(asked, of_torch) == []


def test_unstable_symbols_are_found(of_torch):
    inside = next(s for s in sorted(of_torch) if s.startswith("at::Tensor"))
    plain = next(
        s for s in sorted(of_torch) if re.fullmatch("[a-z]+_[a-z]+", s) and "torch" not in s
    )
    gone = "c10::impl::no_such_thing(int)"
    asked = {inside, plain, gone, "aoti_torch_get_dim", "std::terminate()"}
    assert unstable(asked, of_torch) == sorted([inside, plain, gone])
