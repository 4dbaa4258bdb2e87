"""Expand:  y = base + H @ B (+ H2 @ B2).

A skinny product: y is the only large operand besides base, and each is accessed once.  H and B are
multiplied in the narrower of their dtypes, each rounded once; a pair in fp32 is as precise as y's dtype
needs.  The second pair computes the gradient of x in one pass: dx = dS A + dlogits W.  A loop over ranks
handles any R without spills. Reads T*D (base) + (R+R2)*D, writes T*D.

Letters: T tokens, R rank rows, D columns of y.
"""

import triton
import triton.language as tl

from .launching import launch, precision
from .numerics import INTERPRETED, dot, dot_for_16_bits, matched, round_to, widen
from .operands import require_supported, rows_contiguous
from .tiles import choose, padded


@triton.jit(do_not_specialize=["T"])
def _expand_kernel(
    h_ptr,  # (T, R)
    stride_ht,
    b_ptr,  # (R, D)
    stride_br,
    h2_ptr,  # (T, R2) or None
    stride_h2t,
    b2_ptr,  # (R2, D)
    stride_b2r,
    base_ptr,  # (T, D) or None
    stride_baset,
    y_ptr,  # (T, D)
    T,
    R,
    R2,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)

    y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    y = add_product(
        y, h_ptr, stride_ht, b_ptr, stride_br, t, t < T, d, d < D, R, BLOCK_R, dtype, PRECISION
    )
    if h2_ptr is not None:
        y = add_product(
            y, h2_ptr, stride_h2t, b2_ptr, stride_b2r, t, t < T, d, d < D, R2, BLOCK_R2, dtype, "ieee"
        )  # fmt: skip

    inside = (t < T)[:, None] & (d < D)[None, :]
    if base_ptr is not None:
        base = tl.load(base_ptr + t[:, None] * stride_baset + d[None, :], mask=inside, other=0.0)
        y += widen(base)
    y = round_to(y, y_ptr.dtype.element_ty)
    tl.store(y_ptr + t[:, None] * D + d[None, :], y, mask=inside)


@triton.jit
def add_product(
    y,
    h_ptr,
    stride_ht,
    b_ptr,
    stride_br,
    t,
    t_ok,
    d,
    d_ok,
    R,
    BLOCK_R: tl.constexpr,
    out_dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y + H B, rows t of H."""
    for r0 in range(0, R, BLOCK_R):
        row = r0 + tl.arange(0, BLOCK_R)
        h = h_ptr + t[:, None] * stride_ht + row[None, :]
        h = tl.load(h, mask=t_ok[:, None] & (row < R)[None, :], other=0.0)
        b = b_ptr + row[:, None].to(tl.int64) * stride_br + d[None, :]
        b = tl.load(b, mask=(row < R)[:, None] & d_ok[None, :], other=0.0)
        h, b = matched(h, b, out_dtype)
        if h.dtype == tl.float32 and out_dtype != tl.float32:
            y = dot_for_16_bits(h, b, y)
        else:
            y = dot(h, b, y, PRECISION)
    return y


def expand(h, b, h2, b2, base, dtype):
    """y (T, D) in dtype."""
    require_supported(h, b, *(v for v in (b2, base) if v is not None), dtype=dtype)
    h, b = rows_contiguous(h), rows_contiguous(b)
    T, D = len(h), b.shape[1]
    y = h.new_empty(T, D, dtype=dtype)
    if y.numel() == 0:
        return y
    second = (None, 0, None, 0)
    if h2 is not None:
        h2, b2 = rows_contiguous(h2), rows_contiguous(b2)
        second = (h2, h2.stride(0), b2, b2.stride(0))
    base = rows_contiguous(base)
    tile = choose("expand", y, len(b))
    launch(
        h,
        _expand_kernel,
        (triton.cdiv(T, tile["BLOCK_T"]), triton.cdiv(D, tile["BLOCK_D"])),
        *(h, h.stride(0), b, b.stride(0), *second),
        *(base, 0 if base is None else base.stride(0), y),
        *(T, len(b), 0 if b2 is None else len(b2), D),
        BLOCK_R=rank_step(h, b),
        BLOCK_R2=16 if b2 is None else rank_step(h2, b2),
        PRECISION=precision(b),
        **tile,
    )
    return y


def rank_step(h, b):
    """Ranks per dot: more than 16 spill in fp32; 16-bit operands allow up to 64."""
    wide = h.itemsize == b.itemsize == 4
    return 16 if wide else padded(len(b), 256 if INTERPRETED else 64)
