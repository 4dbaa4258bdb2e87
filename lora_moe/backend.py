"""Which kernels serve which device: decided once, at import, by LORA_MOE_BACKEND and what is there.

    auto       the best that works for each device; never fails
    triton     Triton kernels (for CPU tensors too with TRITON_INTERPRET=1)
    cuda       the CUDA C++ extension, for CUDA tensors that Triton does not serve
    cpp        the C++ extension, for CPU tensors
    reference  plain PyTorch everywhere

Dispatch itself is PyTorch's table: this module only registers kernels in it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import warnings

import torch

from . import ops

BACKENDS = ("triton", "cuda", "cpp", "reference")
ISAS = ("avx512_bf16", "avx512", "avx2", "portable")  # best first

_serving: dict[str, str] = {}
_facts: dict[str, dict] = {}


class BackendUnavailable(ImportError):
    """A backend was asked for by name and cannot serve; the message says why."""


def serving(device_type: str) -> str:
    """The backend that runs operators on tensors of this device type."""
    return _serving.get(device_type, "reference")


def backend_info() -> dict:
    """What serves which device, what else was tried, and the reason where something is missing."""
    return {
        "requested": os.environ.get("LORA_MOE_BACKEND", "auto"),
        "serving": {"cpu": serving("cpu"), "cuda": serving("cuda")},
        "backends": {name: dict(_facts[name]) for name in BACKENDS},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def cpu_isas() -> list[str]:
    """Instruction sets of this CPU that extensions exist for, best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() not in ("x86_64", "amd64") or capability == "DEFAULT":
        return ["portable"]
    if not capability.startswith("AVX512"):
        return list(ISAS[2:])
    return list(ISAS if torch.cpu._is_avx512_bf16_supported() else ISAS[1:])


def _load_cpp() -> dict:
    forced = os.environ.get("LORA_MOE_ISA")
    if forced and forced not in ISAS:
        raise BackendUnavailable(f"LORA_MOE_ISA: expected one of {ISAS}, got {forced!r}")
    reasons = []
    for isa in [forced] if forced else cpu_isas():
        try:
            # only one may be loaded: each registers the same operators
            module = importlib.import_module(f"lora_moe._C_{isa}")
        except ImportError as error:
            reasons.append(f"_C_{isa}: {error}")
            continue
        _serving["cpu"] = "cpp"
        return module.build_info()
    raise BackendUnavailable("the C++ extension is not built (" + "; ".join(reasons) + ")")


def _load_triton() -> dict:
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("triton is not installed (pip install triton)")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.backends.cuda.is_built():
        raise BackendUnavailable(
            "this torch has no CUDA or ROCm; TRITON_INTERPRET=1 runs the kernels on CPU tensors"
        )
    kernels = importlib.import_module("lora_moe.triton_kernels")
    out_of_resources = importlib.import_module("triton.runtime.errors").OutOfResources
    keys = ("CUDA", "CPU") if interpreted else ("CUDA",)
    for name in ops.SCHEMAS:
        for key in keys:
            kernel = _or_reference(name, getattr(kernels, name), out_of_resources)
            if key == "CPU" and name == "grouped_lora":
                kernel = _checking_ids(kernel)
            torch.library.impl(f"lora_moe::{name}", key, kernel)
    _serving.update({key.lower(): "triton" for key in keys})
    return {"interpreted": interpreted, "version": importlib.import_module("triton").__version__}


def _or_reference(name, kernel, out_of_resources):
    """A kernel that does not fit the device gives way to plain PyTorch, with one warning."""

    def run(*args):
        try:
            return kernel(*args)
        except out_of_resources as error:
            warnings.warn(
                f"lora_moe: {name} does not fit this GPU ({error}): plain PyTorch serves instead",
                RuntimeWarning,
                stacklevel=2,
            )
            return ops.reference_operator(name)(*args)

    return run


def _checking_ids(grouped_lora):
    """The kernels mask wrong ids, as a GPU must; on a CPU every backend raises."""

    def checked(x, a, b, base, indices, weights, scaling, *args):
        ops.check_ids(indices, len(scaling))
        return grouped_lora(x, a, b, base, indices, weights, scaling, *args)

    return checked


def _load_cuda() -> dict:
    if importlib.util.find_spec("lora_moe._C_cuda") is None:
        raise BackendUnavailable(
            "the CUDA extension is not built (LORA_MOE_BUILD_CUDA=1 builds it)"
        )
    try:
        module = importlib.import_module("lora_moe._C_cuda")
    except ImportError as error:
        raise BackendUnavailable(
            f"the CUDA extension is built but does not load: {error}"
        ) from error
    if serving("cuda") != "reference":
        reason = (
            f"{serving('cuda')} serves CUDA tensors (LORA_MOE_BACKEND=cuda takes these kernels)"
        )
        return {"available": False, "reason": reason, **module.build_info()}
    module.register_operators()
    _serving["cuda"] = "cuda"
    return module.build_info()


def _load_reference() -> dict:
    return {}


_LOADERS = {
    "triton": _load_triton,
    "cuda": _load_cuda,
    "cpp": _load_cpp,
    "reference": _load_reference,
}


def load() -> None:
    """Register the backends LORA_MOE_BACKEND asks for.

    Raises:
        BackendUnavailable: a backend was named and cannot serve.
        ValueError: LORA_MOE_BACKEND is no backend's name.
    """
    requested = os.environ.get("LORA_MOE_BACKEND", "auto")
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"LORA_MOE_BACKEND: expected auto or one of {BACKENDS}, got {requested!r}")
    for name in BACKENDS:
        if requested not in ("auto", name, "reference") or (
            requested == "reference" and name != "reference"
        ):
            _facts[name] = {"available": False, "reason": f"LORA_MOE_BACKEND={requested}"}
            continue
        if requested == "auto" and name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            # the interpreter is a test bench: it serves CPU tensors only where it is asked to
            _facts[name] = {
                "available": False,
                "reason": "interpreting: set LORA_MOE_BACKEND=triton",
            }
            continue
        try:
            _facts[name] = {"available": True, "reason": "", **_LOADERS[name]()}
        except Exception as error:  # whatever is wrong with a backend, auto falls back
            if requested == name:
                raise BackendUnavailable(f"LORA_MOE_BACKEND={name}: {error}") from error
            _facts[name] = {"available": False, "reason": str(error)}
