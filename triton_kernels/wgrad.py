"""Weight gradients (wgrad):  H^T x  and  H2^T x, in one pass over x.

The gradients of A and of the router's W share x, so [dS | dlogits]^T x is computed tile by tile in two
dots; a single concatenated operand would be padded to twice its size.  A program owns a tile of columns, a
tile of ranks and a split of the tokens; `add_splits` adds the partial sums of the splits in order, so the
result does not depend on the schedule.  Rows of frozen experts cost nothing: a table lists the others.
An fp32 H keeps all of its bits.
Reads T*D + T*(R+R2), writes 4*SPLITS*(R+R2)*D.

Letters: T tokens, R rank rows, D columns of x.
"""

import torch
import triton
import triton.language as tl

from .add_splits import add_splits
from .launching import launch, precision
from .numerics import dot, round_to
from .operands import require_supported, rows_contiguous
from .tiles import choose, padded


@triton.jit(do_not_specialize=["T", "T_SPLIT"])
def _wgrad_kernel(
    x_ptr,  # (T, D)
    stride_xt,
    h_ptr,  # (T, R)
    stride_ht,
    rows_ptr,  # (ROWS,): which columns of H are needed; None: all
    out_ptr,  # (SPLITS, R, D)
    h2_ptr,  # (T, R2) or None
    stride_h2t,
    out2_ptr,  # (SPLITS, R2, D)
    T,
    T_SPLIT,  # tokens per program
    ROWS,
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
    row_ok = row < ROWS
    if rows_ptr is not None:
        row = tl.load(rows_ptr + row, mask=row_ok, other=0)
    row2 = tl.program_id(1) * BLOCK_R2 + tl.arange(0, BLOCK_R2)
    split = tl.program_id(2).to(tl.int64)
    first = split * T_SPLIT
    last = tl.minimum(first + T_SPLIT, T)

    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    total2 = tl.zeros((BLOCK_R2, BLOCK_D), tl.float32)
    for t0 in range(first, last, BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T).to(tl.int64))[:, None]
        x = tl.load(x_ptr + t * stride_xt + d, mask=(t < last) & (d < D), other=0.0)
        h = tl.load(h_ptr + t * stride_ht + row, mask=(t < last) & row_ok, other=0.0)
        total = dot(tl.trans(h), x, total, PRECISION)
        if h2_ptr is not None:
            h2 = tl.load(h2_ptr + t * stride_h2t + row2, mask=(t < last) & (row2 < R2), other=0.0)
            total2 = dot(tl.trans(h2), x, total2, "ieee")

    out = out_ptr + (split * R + row[:, None].to(tl.int64)) * D + d
    total = round_to(total, out_ptr.dtype.element_ty)
    tl.store(out, total, mask=row_ok[:, None] & (d < D))
    if h2_ptr is not None:
        out2 = out2_ptr + (split * R2 + row2[:, None].to(tl.int64)) * D + d
        total2 = round_to(total2, out2_ptr.dtype.element_ty)
        tl.store(out2, total2, mask=(row2 < R2)[:, None] & (d < D))


def wgrad(h, x):
    """H^T x (R, D), fp32."""
    partials, out = wgrad_splits(h, x, torch.float32)
    if partials is not None:
        add_splits((partials, out))
    return out


def wgrad_splits(h, x, dtype, rows=None):
    """H^T x: partial sums (SPLITS, R, D), or None if there is one split, and `out` (R, D) in dtype.

    `out` is complete if there is one split, else `add_splits` fills it.  With a table of rows, the other
    rows are zero.
    """
    return _wgrad_splits(h, x, dtype, rows, None, torch.float32)[0]


def wgrad_pair_splits(h, h2, x, dtype, dtype2, rows=None):
    """The same for H^T x and H2^T x in one pass over x."""
    return _wgrad_splits(h, x, dtype, rows, h2, dtype2)


def _wgrad_splits(h, x, dtype, rows, h2, dtype2):
    require_supported(h, x)
    h, x = rows_contiguous(h), rows_contiguous(x)
    h2 = rows_contiguous(h2)
    (T, D), R, R2 = x.shape, h.shape[1], 0 if h2 is None else h2.shape[1]
    wanted = R if rows is None else len(rows)
    if T == 0 or D == 0 or R == 0 or wanted + R2 == 0:
        return [(None, x.new_zeros(n, D, dtype=kind)) for n, kind in ((R, dtype), (R2, dtype2))]
    tile = choose("wgrad" if R2 <= 16 else "wgrad_many_experts", x, R)
    block_r, block_r2 = padded(wanted, tile.pop("MAX_R")), padded(R2, 64)
    columns = triton.cdiv(D, tile["BLOCK_D"])
    blocks = max(triton.cdiv(wanted, block_r), triton.cdiv(R2, block_r2))
    t_split = split_tokens(T, columns * blocks, tile["BLOCK_T"])
    splits = triton.cdiv(T, t_split)

    def room(n, kind, empty):
        out = empty(n, D, dtype=kind)
        return (None, out) if splits == 1 else (empty(splits, n, D, dtype=torch.float32), out)

    first = room(R, dtype, x.new_empty if rows is None else x.new_zeros)
    second = room(R2, dtype2, x.new_empty)
    at, at2 = (out if partials is None else partials for partials, out in (first, second))
    launch(
        x,
        _wgrad_kernel,
        (columns, blocks, splits),
        *(x, x.stride(0), h, h.stride(0), rows, at),
        *(h2, 0 if h2 is None else h2.stride(0), at2),
        *(T, t_split, wanted, R, R2, D),
        BLOCK_R=block_r,
        BLOCK_R2=block_r2,
        PRECISION=precision(x),
        **tile,
    )
    return [first, second]


def split_tokens(T, programs, block_t):
    """Tokens per program: enough splits for about 256 programs, each of at least four tiles."""
    splits = max(1, min(256 // programs, T // (4 * block_t)))
    return triton.cdiv(triton.cdiv(T, splits), block_t) * block_t
