"""Verifies the CUDA build as far as possible without a GPU (`make check-cuda`).

    LORA_MOE_BACKEND=cuda python -P tests/support/check_cuda.py

Every operator has a CUDA kernel registered, the Python paths run on fake CUDA tensors, and the binary
contains code for the architectures that build_info() names.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

import lora_moe
from lora_moe import functional as F
from lora_moe import ops

T, D_IN, D_OUT, E, K, RANK = 48, 96, 80, 6, 2, 8


def registered() -> dict[str, bool]:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name: has(f"lora_moe::{name}", "CUDA") for name in ops.SCHEMAS}


def run_on_fake_tensors(dtype: torch.dtype) -> str:
    """Runs forward and backward of both public functions with fp32 adapters; returns the shapes as text."""
    with FakeTensorMode():

        def tensor(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=True)

        x, base = tensor(T, D_IN, dtype=dtype), tensor(T, D_OUT, dtype=dtype)
        a, b, w = tensor(E * RANK, D_IN), tensor(E * RANK, D_OUT), tensor(E, D_IN)
        y, routing = F.routed_lora(x, w, a, b, K, rank_offsets=RANK, base=base)
        z = F.grouped_lora(x, a, b, routing, rank_offsets=RANK, base=base)
        dx, dw, da, db = backward(y, "RoutedLoraBackward")[:4]
        dz, dza, dzb = backward(z, "GroupedLoraBackward")[:3]
        for grad, leaf in zip((dx, dw, da, db, dz, dza, dzb), (x, w, a, b, x, a, b)):
            assert grad.shape == leaf.shape
            assert grad.dtype == leaf.dtype
            assert grad.device == leaf.device
        return f"y {tuple(y.shape)} {y.dtype} on {y.device}, dA {tuple(da.shape)} {da.dtype}"


def backward(y, name):
    """The gradients from y's node, which is called directly, as the engine needs a real GPU."""
    node = y.grad_fn
    while node.name() != name:
        node = node.next_functions[0][0]
    outputs = 7 if name == "RoutedLoraBackward" else 1
    return node.apply(torch.ones_like(y), *[None] * (outputs - 1))


def architectures(binary: str, cuobjdump: str) -> dict[str, list[str]]:
    """{"machine code" or "PTX": architectures} in the binary."""

    def listed(what):
        said = subprocess.run([cuobjdump, what, binary], capture_output=True, text=True, check=True)
        return sorted(set(re.findall(r"\.(sm_\w+)\.", said.stdout)), key=lambda s: int(s[3:]))

    return {"machine code": listed("--list-elf"), "PTX": listed("--list-ptx")}


def main() -> None:
    module = importlib.import_module("lora_moe._C_cuda")
    facts = lora_moe.backend_info()["backends"]["cuda"]
    print("torch", torch.__version__, "for CUDA", torch.version.cuda)
    print("cuda backend:", facts)
    assert facts["available"]
    kernels = registered()
    print("CUDA kernels registered:", ", ".join(name for name, has in kernels.items() if has))
    assert all(kernels.values()), kernels
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        print("on fake CUDA tensors:", run_on_fake_tensors(dtype))
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    found = architectures(module.__file__, str(tools / "cuobjdump"))
    print("in the binary:", found, f"{Path(module.__file__).stat().st_size / 2**20:.1f} MiB")
    wanted = facts["architectures"].split(";")
    assert found["machine code"] == [f"sm_{a.split('+')[0].replace('.', '')}" for a in wanted]
    print("all checks passed")


if __name__ == "__main__":
    main()
