"""Small kernels, correct and wrong, for test_interpreter.py."""

import triton
import triton.language as tl
from lora_moe.triton_kernels.numerics import round_to, split, widen


@triton.jit
def dot(a_ptr, out_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    a = tl.load(a_ptr + at)
    tl.store(out_ptr + at, tl.dot(a, a))


@triton.jit
def copy(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < N, other=0.0), mask=at < N)


@triton.jit
def copy_to_the_start(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + tl.program_id(0) * BLOCK + at))


@triton.jit
def copy_without_other(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < N))


@triton.jit
def shift(x_ptr, BLOCK: tl.constexpr):
    """Every program writes what the previous one reads."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(x_ptr + at - tl.program_id(0) * BLOCK, x, mask=at >= BLOCK)


@triton.jit
def far_row(out_ptr, row, stride):
    at = tl.arange(0, 16)
    tl.store(out_ptr + at, (at * 0 + row * stride).to(tl.float32))


@triton.jit
def round_and_widen(x_ptr, out_ptr, out2_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    rounded = round_to(tl.load(x_ptr + at), tl.bfloat16)
    tl.store(out_ptr + at, rounded)
    tl.store(out2_ptr + at, widen(rounded))


@triton.jit
def split_and_add(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    high, middle, low = split(tl.load(x_ptr + at))
    tl.store(out_ptr + at, widen(high) + (widen(middle) + widen(low)))
