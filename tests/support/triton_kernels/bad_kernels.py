"""Prints, as JSON, the rows of small kernels that each violate one guarantee; see test_gpu_static.py."""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl

from benchmarks.static.launches import TARGETS, launches
from benchmarks.static.rows import row


@triton.jit
def matmul(x_ptr, b_ptr, out_ptr, K, BLOCK: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr):
    """With WIDE the operands are cast to fp32 before the dot, so tensor cores cannot be used."""
    row, column = tl.arange(0, BLOCK), tl.arange(0, N)
    total = tl.zeros((BLOCK, N), tl.float32)
    for k0 in range(0, K, BLOCK):
        k = k0 + row
        x = tl.load(x_ptr + row[:, None] * K + k[None, :])
        b = tl.load(b_ptr + k[:, None] * N + column[None, :])
        if WIDE:
            x, b = x.to(tl.float32), b.to(tl.float32)
        total = tl.dot(x, b, total, input_precision="ieee")
    tl.store(out_ptr + row[:, None] * N + column[None, :], total)


@triton.jit
def add_up(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Sums with float atomics, whose order is undefined."""
    at = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + at, tl.load(x_ptr + tl.program_id(0) * BLOCK + at))


def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def matmul_row(target, wide=False, offset=0, block=64, n=64, **options):
    memory = tensor(block * 256 + offset)
    x, b = memory[offset:].view(block, 256), tensor(256, n)
    with launches(target) as seen:
        out = tensor(block, n, dtype=torch.float32)
        matmul[(1,)](
            x, b, out, 256 - offset, BLOCK=block, N=n, WIDE=wide, enable_fp_fusion=True, **options
        )
    return row(seen[-1], {"x": x, "B": b}, TARGETS[target])


def atomic_row(target):
    x, out = tensor(1024, dtype=torch.float32), tensor(256, dtype=torch.float32)
    with launches(target) as seen:
        add_up[(4,)](x, out, BLOCK=256, enable_fp_fusion=True)
    return row(seen[-1], {"x": x}, TARGETS[target])


def main(target):
    found = {
        "good": matmul_row(target),
        "no tensor cores": matmul_row(target, wide=True),
        "narrow loads": matmul_row(target, offset=1),
        "spills": matmul_row(target, wide=True, n=256, num_warps=1),
        "shared memory": matmul_row(target, block=128, n=256, num_warps=8, num_stages=5),
        "float atomics": atomic_row(target),
    }
    promised = {"dtype": "bfloat16", "target": target, "another_T": False}
    print(json.dumps({name: facts | promised for name, facts in found.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
