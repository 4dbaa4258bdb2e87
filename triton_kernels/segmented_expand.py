"""Expand by picked experts only, on tiles of sorted tokens:  y = base + H B (+ H2 B2).

The loop over ranks in `expand` covers the columns of the tile's own experts instead of all R; rows of base
and y are gathered and scattered, which is free at their width.  The second pair is dense: dlogits W.
Reads T*D (base), H and the rows of B of every tile's experts, writes T*D.

Letters: T tokens, E experts, R rank rows, L experts a tile may hold, D columns of y.
"""

import triton
import triton.language as tl

from .expand import add_product, rank_step
from .launching import launch, precision
from .numerics import dot, matched, round_to, widen
from .operands import rows_contiguous
from .segmented_shrink import listed_rows, sharing


@triton.jit(do_not_specialize=["T"])
def _segmented_expand_kernel(
    h_ptr,  # (tiles, BLOCK_T, L*TILE_R)
    b_ptr,  # (R, D)
    stride_br,
    h2_ptr,  # (T, R2) or None
    stride_h2t,
    b2_ptr,  # (R2, D)
    stride_b2r,
    base_ptr,  # (T // SHARE, D) or None
    stride_baset,
    y_ptr,  # (T, D)
    order_ptr,  # (T,)
    experts_ptr,  # (tiles, L)
    number_ptr,  # (tiles,)
    offsets_ptr,  # (E+1,), or None: every expert has `rank` rows
    rank,
    T,
    E,
    L,
    R2,
    D,
    BLOCKS,  # of columns; one axis of the grid takes any number of tiles, the others at most 65,535
    SHARE: tl.constexpr,  # consecutive tokens that read the same row of base
    TILE_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_R2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok = i < T
    t = tl.load(order_ptr + i, mask=t_ok, other=0).to(tl.int64)
    d = tl.program_id(0) % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    number = tl.load(number_ptr + tile)
    experts_ptr += tile * L
    h_ptr += tile * BLOCK_T * (L * TILE_R)

    y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, number * TILE_R, BLOCK_R):
        column = first + tl.arange(0, BLOCK_R)
        row, row_ok = listed_rows(offsets_ptr, rank, experts_ptr, number, first, E, BLOCK_R, TILE_R)
        h = h_ptr + tl.arange(0, BLOCK_T)[:, None] * (L * TILE_R) + column[None, :]
        h = tl.load(h, mask=t_ok[:, None] & (column < number * TILE_R)[None, :], other=0.0)
        b = b_ptr + row[:, None].to(tl.int64) * stride_br + d[None, :]
        b = tl.load(b, mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
        h, b = matched(h, b, y_ptr.dtype.element_ty)
        y = dot(h, b, y, PRECISION)
    if h2_ptr is not None:
        y = add_product(
            y, h2_ptr, stride_h2t, b2_ptr, stride_b2r, t, t_ok, d, d < D, R2, BLOCK_R2,
            y_ptr.dtype.element_ty, "ieee",
        )  # fmt: skip

    inside = t_ok[:, None] & (d < D)[None, :]
    if base_ptr is not None:
        base = base_ptr + (t // SHARE)[:, None] * stride_baset + d[None, :]
        y += widen(tl.load(base, mask=inside, other=0.0))
    y = round_to(y, y_ptr.dtype.element_ty)
    tl.store(y_ptr + t[:, None] * D + d[None, :], y, mask=inside)


def segmented_expand(h, b, h2, b2, base, segments, experts, dtype):
    """y (T, D) in dtype, from H tile by tile."""
    order, listed, number, tile = segments
    T, D = len(order), b.shape[1]
    y = h.new_empty(T, D, dtype=dtype)
    if y.numel() == 0:
        return y
    b = rows_contiguous(b)
    second = (None, 0, None, 0)
    if h2 is not None:
        h2, b2 = rows_contiguous(h2), rows_contiguous(b2)
        second = (h2, h2.stride(0), b2, b2.stride(0))
    base = rows_contiguous(base)
    blocks = triton.cdiv(D, tile["BLOCK_N"])
    launch(
        h,
        _segmented_expand_kernel,
        (blocks * len(number),),
        *(h, b, b.stride(0), *second, base, 0 if base is None else base.stride(0), y),
        *(order, listed, number, experts.offsets, experts.rank),
        *(T, len(experts.scaling), listed.shape[1], 0 if b2 is None else len(b2), D, blocks),
        SHARE=1 if base is None else sharing(T, base),
        TILE_R=experts.own_columns,
        BLOCK_T=tile["BLOCK_T"],
        BLOCK_D=tile["BLOCK_N"],
        BLOCK_R=min(rank_step(h, b), experts.own_columns),
        BLOCK_R2=16 if b2 is None else rank_step(h2, b2),
        PRECISION=precision(h),
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    return y
