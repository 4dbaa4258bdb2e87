"""Gram:  H^T x  and  H2^T x, in one pass over x.

The gradients of A and of the router's W share x, so [dS | dlogits]^T x is formed tile by tile in two
dots; one concatenated operand would be padded to twice its size.  A program owns a tile of columns, a
tile of ranks and a stretch of the tokens; the stretches' partial sums are added in order, so the result
does not depend on the schedule.  An fp32 H keeps all of its bits.
Reads T*D + T*(R+R2), writes 4*SPLITS*(R+R2)*D.

Letters: T tokens, R rank rows, D columns of x.
"""

import torch
import triton
import triton.language as tl

from .launching import column_rows, launch, padded, precision, require_supported
from .numerics import dot
from .tiles import choose


@triton.jit(do_not_specialize=["T", "T_SPLIT"])
def _gram_kernel(
    x_ptr,  # (T, D)
    stride_xt,
    h_ptr,  # (T, R)
    stride_ht,
    out_ptr,  # (SPLITS, R, D)
    h2_ptr,  # (T, R2) or None
    stride_h2t,
    out2_ptr,  # (SPLITS, R2, D)
    T,
    T_SPLIT,
    R,
    R2,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row2 = tl.program_id(1) * BLOCK_R2 + tl.arange(0, BLOCK_R2)
    split = tl.program_id(2).to(tl.int64)
    first = split * T_SPLIT
    last = tl.minimum(first + T_SPLIT, T)

    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    total2 = tl.zeros((BLOCK_R2, BLOCK_D), tl.float32)
    for t0 in range(first, last, BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T).to(tl.int64))[:, None]
        x = tl.load(x_ptr + t * stride_xt + d, mask=(t < last) & (d < D), other=0.0)
        h = tl.load(h_ptr + t * stride_ht + row, mask=(t < last) & (row < R), other=0.0)
        total = dot(tl.trans(h), x, total, PRECISION)
        if h2_ptr is not None:
            h2 = tl.load(h2_ptr + t * stride_h2t + row2, mask=(t < last) & (row2 < R2), other=0.0)
            total2 = dot(tl.trans(h2), x, total2, "ieee")

    row, row2 = row[:, None].to(tl.int64), row2[:, None].to(tl.int64)
    tl.store(out_ptr + (split * R + row) * D + d, total, mask=(row < R) & (d < D))
    if h2_ptr is not None:
        tl.store(out2_ptr + (split * R2 + row2) * D + d, total2, mask=(row2 < R2) & (d < D))


def gram(h, x):
    """H^T x (R, D), fp32."""
    return gram_pair(h, None, x)[0]


def gram_pair(h, h2, x):
    """H^T x (R, D) and H2^T x (R2, D), or an empty tensor without H2."""
    require_supported(h, x)
    h, x = column_rows(h), column_rows(x)
    h2 = None if h2 is None else column_rows(h2)
    T, D = x.shape
    R, R2 = h.shape[1], 0 if h2 is None else h2.shape[1]
    if T == 0 or D == 0 or R == 0:
        return tuple(x.new_zeros(shape, dtype=torch.float32) for shape in ((R, D), (R2, D)))
    tile = choose("gram", x, R)
    block_r = padded(R, tile.pop("MAX_R"))
    block_r2 = padded(R2, 64)
    columns = triton.cdiv(D, tile["BLOCK_D"])
    rows = max(triton.cdiv(R, block_r), triton.cdiv(R2, block_r2))
    stretch = split_tokens(T, columns * rows, tile["BLOCK_T"])
    splits = triton.cdiv(T, stretch)
    out = x.new_empty(splits, R, D, dtype=torch.float32)
    out2 = x.new_empty(splits, R2, D, dtype=torch.float32)
    launch(
        x,
        _gram_kernel,
        (columns, rows, splits),
        *(x, x.stride(0), h, h.stride(0), out, h2, 0 if h2 is None else h2.stride(0), out2),
        *(T, stretch, R, R2, D),
        BLOCK_R=block_r,
        BLOCK_R2=block_r2,
        PRECISION=precision(x),
        **tile,
    )
    return tuple(v[0] if splits == 1 else v.sum(0) for v in (out, out2))


def split_tokens(T, programs, block_t):
    """Tokens a program: enough stretches for about 256 programs, each of at least four tiles."""
    stretches = max(1, min(256 // programs, T // (4 * block_t)))
    return triton.cdiv(triton.cdiv(T, stretches), block_t) * block_t
