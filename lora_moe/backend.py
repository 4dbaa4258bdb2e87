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

from . import missing_operators, ops

BACKENDS = ("triton", "cuda", "cpp", "reference")
ISAS = ("avx512_bf16", "avx512", "avx2", "portable")  # best first

_serving: dict[str, str] = {}
_facts: dict[str, dict] = {}


class BackendUnavailable(ImportError):
    """A backend was asked for by name and cannot serve; the message says why."""


def serving(device_type: str) -> str:
    """The backend that runs operators on tensors of this device type."""
    return _serving.get(device_type, "reference")


def requested() -> str:
    """LORA_MOE_BACKEND; an empty one counts as unset."""
    return os.environ.get("LORA_MOE_BACKEND") or "auto"


def backend_info() -> dict:
    """What serves which device, what else was tried, and the reason where something is missing."""
    return {
        "requested": requested(),
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


def _isas_to_try() -> list[str]:
    """Those of this CPU, or the one of LORA_MOE_ISA; one that it lacks would end the process."""
    forced = os.environ.get("LORA_MOE_ISA")
    if not forced:
        return cpu_isas()
    if forced not in ISAS:
        raise BackendUnavailable(f"LORA_MOE_ISA: expected one of {ISAS}, got {forced!r}")
    has = {
        "avx2": torch.cpu._is_avx2_supported,
        "avx512": torch.cpu._is_avx512_supported,
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
    }
    if forced != "portable" and not has[forced]():
        raise BackendUnavailable(f"LORA_MOE_ISA={forced}: this CPU does not have it")
    return [forced]


def _load_cpp() -> dict:
    failures = {}
    for isa in _isas_to_try():
        try:
            module = importlib.import_module(f"lora_moe._C_{isa}")
            info = _built_for_these_operators(module)
        except ImportError as error:
            failures[isa] = error
            continue
        module.register_operators()
        _serving["cpu"] = "cpp"
        return {"reason": _why_missing(failures), **info}
    raise BackendUnavailable(_why_missing(failures))


def _why_missing(failures) -> str:
    """Told at once where there is something to mend, and not only slower for it."""
    if not failures:
        return ""
    reason = missing_operators.explain(failures)
    if missing_operators.is_broken(failures):
        warnings.warn(f"lora_moe: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _built_for_these_operators(module) -> dict:
    """The facts of an extension that is as old as this package; another one would misread its arguments."""
    info = module.build_info()
    if info.get("operators") != ops.VERSION:
        raise BackendUnavailable(
            f"built for operators of version {info.get('operators')}, not {ops.VERSION}: build it again"
        )
    return info


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
    info = _built_for_these_operators(module)
    if serving("cuda") != "reference":
        reason = (
            f"{serving('cuda')} serves CUDA tensors (LORA_MOE_BACKEND=cuda takes these kernels)"
        )
        return {"available": False, "reason": reason, **info}
    module.register_operators()
    _serving["cuda"] = "cuda"
    return info


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
    asked = requested()
    if asked not in ("auto", *BACKENDS):
        raise ValueError(f"LORA_MOE_BACKEND: expected auto or one of {BACKENDS}, got {asked!r}")
    for name in BACKENDS:
        if asked not in ("auto", name):
            _facts[name] = {"available": False, "reason": f"LORA_MOE_BACKEND={asked}"}
            continue
        if asked == "auto" and name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            # the interpreter is a test bench: it serves CPU tensors only where it is asked to
            reason = "interpreting: set LORA_MOE_BACKEND=triton"
            _facts[name] = {"available": False, "reason": reason}
            continue
        try:
            _facts[name] = {"available": True, "reason": "", **_LOADERS[name]()}
        except Exception as error:  # whatever is wrong with a backend, auto falls back
            if asked == name:
                raise BackendUnavailable(f"LORA_MOE_BACKEND={name}: {error}") from error
            _facts[name] = {"available": False, "reason": " ".join(str(error).split())}
