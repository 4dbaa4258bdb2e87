"""Weight gradients (wgrad):  H^T x  and  H2^T x, in one pass over x, and in the same launch  H3^T x3.

The gradients of A and of the router's W share x, so [dS | dlogits]^T x is computed tile by tile in two
dots; a single concatenated operand would be padded to twice its size.  The gradient of B, H^T dy, needs none
of this, but its programs fill the device beside theirs: half as many splits are left to add up.  A program
owns a tile of columns of x or of x3, a tile of ranks and a split of the tokens; `add_splits` adds the
partial sums of the splits in order, so the result does not depend on the schedule.  Rows of frozen experts
cost nothing: a table lists the others.  An fp32 H keeps all of its bits.
Reads T*(D+D3) + T*(R+R2+R3), writes 4*SPLITS*((R+R2)*D + R3*D3).

Letters: T tokens, R rank rows, D columns of x.
"""

from typing import NamedTuple

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
    ROWS,
    R,
    D,
    h2_ptr,  # (T, R2) or None
    stride_h2t,
    out2_ptr,  # (SPLITS, R2, D)
    R2,
    x3_ptr,  # (T, D3) or None
    stride_x3t,
    h3_ptr,  # (T, R3)
    stride_h3t,
    rows3_ptr,  # (ROWS3,) or None
    out3_ptr,  # (SPLITS, R3, D3)
    ROWS3,
    R3,
    D3,
    T,
    T_SPLIT,  # tokens per program
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,
    BLOCK_R3: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column = tl.program_id(0)
    columns = tl.cdiv(D, BLOCK_D)
    split = tl.program_id(2).to(tl.int64)
    first = split * T_SPLIT
    last = tl.minimum(first + T_SPLIT, T)
    if column < columns:
        products(
            x_ptr, stride_xt, h_ptr, stride_ht, rows_ptr, out_ptr, ROWS, R, D, h2_ptr, stride_h2t,
            out2_ptr, R2, column, split, first, last, BLOCK_T, BLOCK_D, BLOCK_R, BLOCK_R2, PRECISION,
        )  # fmt: skip
    else:
        if x3_ptr is not None:
            products(
                x3_ptr, stride_x3t, h3_ptr, stride_h3t, rows3_ptr, out3_ptr, ROWS3, R3, D3, None, 0,
                None, 0, column - columns, split, first, last, BLOCK_T, BLOCK_D, BLOCK_R3, BLOCK_R2,
                PRECISION,
            )  # fmt: skip


@triton.jit
def products(
    x_ptr,
    stride_xt,
    h_ptr,
    stride_ht,
    rows_ptr,
    out_ptr,
    ROWS,
    R,
    D,
    h2_ptr,
    stride_h2t,
    out2_ptr,
    R2,
    column,
    split,
    first,
    last,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of H^T x and, unless H2 is None, of H2^T x, over tokens first..last - 1."""
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok = row < ROWS
    if rows_ptr is not None:
        row = tl.load(rows_ptr + row, mask=row_ok, other=0)
    row2 = tl.program_id(1) * BLOCK_R2 + tl.arange(0, BLOCK_R2)

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
    ((partials, out),) = wgrad_splits(x, [Weight(h, torch.float32)])
    if partials is not None:
        add_splits((partials, out))
    return out


class Weight(NamedTuple):
    """A gradient H^T x: H (T, R), the dtype of the result, a table of the rows needed (None: all)."""

    h: torch.Tensor
    dtype: torch.dtype
    rows: torch.Tensor | None = None

    @property
    def wanted(self):
        return self.h.shape[1] if self.rows is None else len(self.rows)


def wgrad_splits(x, of_x, x3=None, of_x3=()):
    """For every Weight: partial sums (SPLITS, R, D), or None if there is one split, and `out` (R, D).

    `out` is complete if there is one split, else `add_splits` fills it.  With a table of rows, the other
    rows are zero.  `of_x` may name two weights, the second without a table; `of_x3` one, of which x3 is
    the other operand.
    """
    if not of_x:
        return wgrad_splits(x3, of_x3) if of_x3 else []
    require_supported(x, *(w.h for w in (*of_x, *of_x3)))
    if nothing_to_add(x, of_x):
        return [empty_gradient(x, w) for w in of_x] + wgrad_splits(x3, of_x3)
    if of_x3 and nothing_to_add(x3, of_x3):
        return wgrad_splits(x, of_x) + [empty_gradient(x3, w) for w in of_x3]
    return _launch(rows_contiguous(x), of_x, rows_contiguous(x3) if of_x3 else None, of_x3)


def nothing_to_add(x, weights):
    return x.numel() == 0 or sum(w.wanted for w in weights) == 0


def empty_gradient(x, weight):
    return None, x.new_zeros(weight.h.shape[1], x.shape[1], dtype=weight.dtype)


def _launch(x, of_x, x3, of_x3):
    one, two = (*of_x, None)[:2]
    three = of_x3[0] if of_x3 else None
    R2 = 0 if two is None else two.wanted
    width = max(w.h.shape[1] for w in (one, *of_x3))
    tile = choose("wgrad" if R2 <= 16 else "wgrad_many_experts", x, width)
    most = tile.pop("MAX_R")
    blocks = [padded(w.wanted, most) for w in (one, *of_x3)]
    block2 = padded(R2, 64)
    columns = sum(triton.cdiv(v.shape[1], tile["BLOCK_D"]) for v in (x, x3) if v is not None)
    rows = [triton.cdiv(w.wanted, block) for w, block in zip((one, *of_x3), blocks)]
    rows = max(*rows, triton.cdiv(R2, block2))
    t_split = split_tokens(len(x), columns * rows, tile["BLOCK_T"])
    splits = triton.cdiv(len(x), t_split)
    found = [room(x, w, splits) for w in of_x] + [room(x3, w, splits) for w in of_x3]
    outs = [out if partials is None else partials for partials, out in found]
    launch(
        x,
        _wgrad_kernel,
        (columns, rows, splits),
        *operands(x, one, outs[0]),
        *operands(x, two, outs[-1])[2:4],
        *(None if two is None else outs[1], R2),
        *operands(x3, three, outs[-1]),
        *(len(x), t_split),
        BLOCK_R=blocks[0],
        BLOCK_R2=block2,
        BLOCK_R3=blocks[-1],
        PRECISION=precision(x),
        **tile,
    )
    return found


def room(x, weight, splits):
    """Where the programs write a gradient: (partial sums or None, out)."""
    n, D = weight.h.shape[1], x.shape[1]
    empty = x.new_empty if weight.rows is None else x.new_zeros
    out = empty(n, D, dtype=weight.dtype)
    return (None if splits == 1 else empty(splits, n, D, dtype=torch.float32)), out


def operands(x, weight, out):
    """A product as the kernel takes it."""
    if weight is None:
        return None, 0, None, 0, None, None, 0, 0, 0
    h = rows_contiguous(weight.h)
    return (
        *(x, x.stride(0), h, h.stride(0), weight.rows, out),
        *(weight.wanted, h.shape[1], x.shape[1]),
    )


def split_tokens(T, programs, block_t):
    """Tokens per program: enough splits for about 256 programs, each of at least four tiles."""
    splits = max(1, min(256 // programs, T // (4 * block_t)))
    return triton.cdiv(triton.cdiv(T, splits), block_t) * block_t
