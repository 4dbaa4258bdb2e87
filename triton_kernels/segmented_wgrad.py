"""Gradients of A and B by picked experts only:  out[rows of e] = sum over slots of e of  H_tj x_t^T.

Slots are sorted by expert within each window.  A program owns an expert's rows, a tile of columns and a
window; it gathers the rows of x that its slots name and writes its sum, or zeros if the expert has no
slot in the window.  Skew therefore costs at most one window per program, and these sums are added in order.
Reads T*K*D and T*K*r, writes 4*windows*R*D.

Letters: T tokens, E experts, K slots per token, R rank rows, r the largest rank, D columns of x.
"""

import torch
import triton
import triton.language as tl

from .launching import launch, precision
from .numerics import dot, round_to
from .operands import rows_contiguous
from .segmented_shrink import sharing
from .sort_tokens import sort_slots
from .tiles import choose, sort_window


@triton.jit
def _segmented_wgrad_kernel(
    x_ptr,  # (T, D), or (T*K, D) if K is 1
    stride_xt,
    h_ptr,  # (T, K, r)
    order_ptr,  # (T*K,)
    starts_ptr,  # (windows, E+1)
    window_size,
    frozen_ptr,  # (E,) int32 or None
    offsets_ptr,  # (E+1,), or None: every expert has `rank` rows
    rank,
    out_ptr,  # (windows, R, D)
    E,
    R,
    D,
    r,
    K: tl.constexpr,
    TILE_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    e = tl.program_id(1) // (TILE_R // BLOCK_R)
    c = tl.program_id(1) % (TILE_R // BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    window = tl.program_id(2).to(tl.int64)
    start = tl.load(starts_ptr + window * (E + 1) + e)
    stop = tl.load(starts_ptr + window * (E + 1) + e + 1)
    if frozen_ptr is not None:
        stop = tl.where(tl.load(frozen_ptr + e) != 0, start, stop)

    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    order_ptr += window * window_size
    for i0 in range(start, stop, BLOCK_T):
        i = i0 + tl.arange(0, BLOCK_T)
        p = tl.load(order_ptr + i, mask=i < stop, other=0).to(tl.int64)[:, None]
        x = x_ptr + (p // K) * stride_xt + d[None, :]
        x = tl.load(x, mask=(i < stop)[:, None] & (d < D)[None, :], other=0.0)
        h = tl.load(
            h_ptr + p * r + c[None, :], mask=(i < stop)[:, None] & (c < r)[None, :], other=0.0
        )
        total = dot(tl.trans(h), x, total, PRECISION)

    if offsets_ptr is None:
        first = e * rank
        last = first + rank
    else:
        first = tl.load(offsets_ptr + e)
        last = tl.load(offsets_ptr + e + 1)
    row = (first + c)[:, None].to(tl.int64)
    at = (window * R + row) * D + d[None, :]
    inside = (row < last) & (d < D)[None, :]
    tl.store(out_ptr + at, round_to(total, out_ptr.dtype.element_ty), mask=inside)


def sorted_slots(indices, E):
    """Slots by expert, the start of each expert's slots in every window, and the window size."""
    return *sort_slots(indices, E), sort_window("slot")


def segmented_wgrad(h, x, slots, experts, frozen, dtype):
    """Like wgrad_splits, with a partial sum per window: (windows, R, D) or None, and out (R, D)."""
    order, starts, window = slots
    x = rows_contiguous(x)
    R, D, E = len(experts.b), x.shape[1], len(experts.scaling)
    windows, r = len(starts), h.shape[-1]
    out = x.new_empty(R, D, dtype=dtype)
    partials = None if windows == 1 else x.new_empty(windows, R, D, dtype=torch.float32)
    tile = choose("segmented_wgrad", x, experts.TILE_R)
    TILE_R = experts.own_columns
    block_r = min(TILE_R, 128)
    launch(
        x,
        _segmented_wgrad_kernel,
        (triton.cdiv(D, tile["BLOCK_D"]), E * (TILE_R // block_r), windows),
        *(x, x.stride(0), h, order, starts, window, frozen, experts.offsets, experts.rank),
        *(out if partials is None else partials, E, R, D, r),
        K=sharing(len(order), x),
        TILE_R=TILE_R,
        BLOCK_R=block_r,
        PRECISION=precision(x),
        **tile,
    )
    return partials, out
