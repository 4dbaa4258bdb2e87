"""Products and roundings shared by all kernels.

16-bit operands go to the tensor cores unchanged, and sums are fp32.  An fp32 operand multiplied by a
16-bit one keeps all of its bits, so the router's products have full fp32 precision at tensor-core speed.

Triton's interpreter stores bf16 as raw bits, multiplies those bits in a dot and truncates when it
casts.  INTERPRETED is known when the kernels are decorated, so the workarounds cost a compiled kernel
nothing.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# whether products of fp32 and 16-bit operands use bf16 terms; the interpreter only does so in tests
SPLIT = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def widen(v):
    """v in fp32."""
    if INTERPRETED and v.dtype == tl.bfloat16:
        bits = v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = v.to(tl.float32)
    return wide


@triton.jit
def round_to(v, dtype: tl.constexpr):
    """An fp32 v in dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(v == v, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = v.to(dtype)
    return rounded


@triton.jit
def convert(v, dtype: tl.constexpr):
    """v in dtype, rounded to nearest even."""
    if v.dtype != dtype:
        v = round_to(widen(v), dtype)
    return v


@triton.jit
def matched(h, b, out_dtype: tl.constexpr):
    """Operands of a product H B in one dtype: H's if it is 16-bit, else B's if the output is 16-bit too."""
    if h.dtype != tl.float32:
        b = convert(b, h.dtype)
    elif out_dtype != tl.float32:
        h = convert(h, b.dtype)
    else:
        b = convert(b, tl.float32)
    return h, b


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b.  (M, K), (K, N), (M, N); PRECISION is that of two fp32 operands.

    If the other operand is 16-bit, an fp32 operand is split into three bf16 terms, which hold its 24
    bits, and an fp16 operand into two: every product is exact, at tensor-core speed.
    """
    if a.dtype == b.dtype:
        if INTERPRETED:
            acc = tl.dot(widen(a), widen(b), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    elif not SPLIT:
        acc = tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        top, rest = dot_split(a, b, tl.zeros(acc.shape, tl.float32), True)
        acc += whole(top, rest)
    else:
        top, rest = dot_split(b, a, tl.zeros(acc.shape, tl.float32), False)
        acc += whole(top, rest)
    return acc


@triton.jit
def dot_apart(a, b, acc):
    """acc + a @ b for the router: for any operands, the sum does not use a truncating accumulator."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        step = dot(a, b, tl.zeros(acc.shape, tl.float32), "ieee")
        acc = tl.fma(step, tl.full(acc.shape, 1.0, tl.float32), acc)  # `+` would fuse into the dot
    else:
        acc = dot(a, b, acc, "ieee")
    return acc


@triton.jit
def dot_for_16_bits(a, b, acc):
    """acc + a @ b of fp32 operands whose sum is rounded to 16 bits in the end.

    Omits the smallest of the products of their bf16 halves: an error of 2^-16, at tensor-core speed.
    """
    if SPLIT:
        a_high, a_low, _ = split(a)
        b_high, b_low, _ = split(b)
        zeros = tl.zeros(acc.shape, tl.float32)
        rest = dot_bf16(a_high, b_low, dot_bf16(a_low, b_high, zeros))
        acc += whole(dot_bf16(a_high, b_high, zeros), rest)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def dot_split(wide, narrow, zeros, WIDE_IS_LEFT: tl.constexpr):
    """The product of an fp32 and a 16-bit operand, as two sums: of their highest terms, and of the rest.

    Both start from zero, and the caller adds them to the accumulator: the tensor cores truncate what they
    accumulate, by up to one unit in the last place of the sum per sixteen products.
    """
    high, middle, low = split(wide)
    rest = zeros
    if narrow.dtype == tl.float16:
        narrow, narrow_low, _ = split(narrow.to(tl.float32))
        rest = dot_either(low, narrow_low, rest, WIDE_IS_LEFT)
        rest = dot_either(middle, narrow_low, rest, WIDE_IS_LEFT)
        rest = dot_either(high, narrow_low, rest, WIDE_IS_LEFT)
    rest = dot_either(low, narrow, rest, WIDE_IS_LEFT)
    rest = dot_either(middle, narrow, rest, WIDE_IS_LEFT)
    return dot_either(high, narrow, zeros, WIDE_IS_LEFT), rest


@triton.jit
def dot_either(wide, narrow, acc, WIDE_IS_LEFT: tl.constexpr):
    if WIDE_IS_LEFT:
        acc = dot_bf16(wide, narrow, acc)
    else:
        acc = dot_bf16(narrow, wide, acc)
    return acc


@triton.jit
def dot_bf16(a, b, acc):
    """acc + a @ b of bf16 operands."""
    if INTERPRETED:
        a, b = widen(a), widen(b)
    return tl.dot(a, b, acc)


@triton.jit
def whole(top, rest):
    """top + rest, or just top if it is infinite or NaN: inf times a lower term may have any sign."""
    return tl.where(tl.abs(top) < float("inf"), top + rest, top)


@triton.jit
def split(v):
    """Three bf16 terms whose sum is the fp32 v; an infinite v is the first of them."""
    high = round_to(v, tl.bfloat16)
    rest = tl.where(tl.abs(widen(high)) < float("inf"), v - widen(high), 0.0)
    middle = round_to(rest, tl.bfloat16)
    low = round_to(rest - widen(middle), tl.bfloat16)
    return high, middle, low


@triton.jit
def project(
    x_ptr,
    stride_xt,
    t,
    t_ok,
    a_ptr,
    stride_ar,
    row,
    row_ok,
    w_ptr,
    stride_we,
    e,
    e_ok,
    first,
    last,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x A^T and x W^T over columns first..last - 1, in one pass over x; either matrix may be None.

    A is rounded to x's dtype; W, the router's, keeps all of its bits.
    """
    s = tl.zeros((t.shape[0], row.shape[0]), tl.float32)
    logits = tl.zeros((t.shape[0], e.shape[0]), tl.float32)
    x_row = x_ptr + t[:, None] * stride_xt
    for d0 in range(first, last, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D))[None, :]
        x = tl.load(x_row + d, mask=t_ok[:, None] & (d < last), other=0.0)
        if a_ptr is not None:
            a = a_ptr + row[:, None].to(tl.int64) * stride_ar + d
            a = tl.load(a, mask=row_ok[:, None] & (d < last), other=0.0)
            s = dot(x, tl.trans(convert(a, x.dtype)), s, PRECISION)
        if w_ptr is not None:
            w = w_ptr + e[:, None].to(tl.int64) * stride_we + d
            w = tl.load(w, mask=e_ok[:, None] & (d < last), other=0.0)
            logits = dot_apart(x, tl.trans(w), logits)
    return s, logits


@triton.jit
def in_first(mask, index):
    """The mask itself for index 0, all false for any other."""
    return mask.to(tl.int32) > index


@triton.jit
def rows_of(ptr, t0, width, column, BLOCK_T: tl.constexpr):
    """Rows t0.. of a contiguous (T, width) tensor: a 64-bit base and 32-bit offsets, half the registers."""
    return ptr + t0 * width + (tl.arange(0, BLOCK_T)[:, None] * width + column[None, :])


@triton.jit
def load_total(partial_ptr, SPLITS, T, t0, width, column, inside, BLOCK_T: tl.constexpr):
    """The sum that `project` would compute, from the partial sums that `shrink` wrote.  (SPLITS, T, width)"""
    total = tl.zeros((BLOCK_T, column.shape[0]), tl.float32)
    for _split in range(SPLITS):
        total += tl.load(rows_of(partial_ptr, t0, width, column, BLOCK_T), mask=inside, other=0.0)
        t0 += T
    return total
