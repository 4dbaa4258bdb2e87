"""Selects the backend of each device at import, from LORA_MOE_BACKEND and what is installed.

    auto       the best available backend for each device; never fails
    triton     Triton kernels (also for CPU tensors with TRITON_INTERPRET=1)
    cuda       the CUDA C++ extension, for CUDA tensors that Triton does not serve
    cpp        the C++ extension, for CPU tensors
    reference  plain PyTorch everywhere

PyTorch dispatches the calls; this module only registers the kernels.
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
    """A backend was requested by name but is unavailable; the message gives the reason."""


def serving(device_type: str) -> str:
    """The backend that runs operators on tensors of this device type."""
    return _serving.get(device_type, "reference")


def requested() -> str:
    """LORA_MOE_BACKEND; an empty value counts as unset."""
    return os.environ.get("LORA_MOE_BACKEND") or "auto"


def backend_info() -> dict:
    """The backend of each device, the status of every backend, and why one is unavailable."""
    return {
        "requested": requested(),
        "serving": {"cpu": serving("cpu"), "cuda": serving("cuda")},
        "backends": {name: dict(_facts[name]) for name in BACKENDS},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def cpu_isas() -> list[str]:
    """Instruction sets of this CPU for which we build extensions, best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() not in ("x86_64", "amd64") or capability == "DEFAULT":
        return ["portable"]
    if not capability.startswith("AVX512"):
        return list(ISAS[2:])
    return list(ISAS if torch.cpu._is_avx512_bf16_supported() else ISAS[1:])


def _isas_to_try() -> list[str]:
    """Those of this CPU, or LORA_MOE_ISA; using one that the CPU lacks would crash the process."""
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
        raise BackendUnavailable(f"LORA_MOE_ISA={forced}: this CPU does not support it")
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
    """The reason; also warns if the build is broken, as opposed to merely slower."""
    if not failures:
        return ""
    reason = missing_operators.explain(failures)
    if missing_operators.is_broken(failures):
        warnings.warn(f"lora_moe: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _built_for_these_operators(module) -> dict:
    """build_info of an extension whose operator version matches; others would misread the arguments."""
    info = module.build_info()
    if info.get("operators") != ops.VERSION:
        raise BackendUnavailable(
            f"built for operator version {info.get('operators')}, expected {ops.VERSION}; rebuild it"
        )
    return info


def _load_triton() -> dict:
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("triton is not installed (pip install triton)")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.backends.cuda.is_built():
        raise BackendUnavailable(
            "this build of torch has no CUDA or ROCm; TRITON_INTERPRET=1 runs the kernels on the CPU"
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
    """Wrap the kernel: where it does not fit the device, warn and run plain PyTorch."""

    def run(*args):
        try:
            return kernel(*args)
        except out_of_resources as error:
            warnings.warn(
                f"lora_moe: {name} does not fit this GPU ({error}); falling back to plain PyTorch",
                RuntimeWarning,
                stacklevel=2,
            )
            return ops.reference_operator(name)(*args)

    return run


def _checking_ids(grouped_lora):
    """The kernels mask invalid ids, since a GPU cannot raise; on a CPU every backend raises."""

    def checked(x, a, b, base, indices, weights, scaling, *args):
        ops.check_ids(indices, len(scaling))
        return grouped_lora(x, a, b, base, indices, weights, scaling, *args)

    return checked


def _load_cuda() -> dict:
    if importlib.util.find_spec("lora_moe._C_cuda") is None:
        raise BackendUnavailable(
            "the CUDA extension is not built (build with LORA_MOE_BUILD_CUDA=1)"
        )
    try:
        module = importlib.import_module("lora_moe._C_cuda")
    except ImportError as error:
        raise BackendUnavailable(f"the CUDA extension failed to load: {error}") from error
    info = _built_for_these_operators(module)
    if serving("cuda") != "reference":
        reason = (
            f"{serving('cuda')} serves CUDA tensors (LORA_MOE_BACKEND=cuda selects this backend)"
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
    """Register the backends that LORA_MOE_BACKEND requests.

    Raises:
        BackendUnavailable: if a backend is requested by name and is unavailable.
        ValueError: if LORA_MOE_BACKEND is not the name of a backend.
    """
    asked = requested()
    if asked not in ("auto", *BACKENDS):
        raise ValueError(f"LORA_MOE_BACKEND: expected auto or one of {BACKENDS}, got {asked!r}")
    for name in BACKENDS:
        if asked not in ("auto", name):
            _facts[name] = {"available": False, "reason": f"LORA_MOE_BACKEND={asked}"}
            continue
        if asked == "auto" and name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            # the interpreter is for tests: it serves CPU tensors only on request
            reason = "TRITON_INTERPRET=1 is set; to use the interpreter set LORA_MOE_BACKEND=triton"
            _facts[name] = {"available": False, "reason": reason}
            continue
        try:
            _facts[name] = {"available": True, "reason": "", **_LOADERS[name]()}
        except Exception as error:  # auto falls back on any error
            if asked == name:
                raise BackendUnavailable(f"LORA_MOE_BACKEND={name}: {error}") from error
            _facts[name] = {"available": False, "reason": " ".join(str(error).split())}
