"""Expand by picked experts only, on tiles of sorted tokens:  y = base + H B (+ H2 B2),

    H_te = sum over slots j that name e of  S_tj g_tj s_e,  or of dS_tj, which includes its gate

The loop over ranks in `expand` covers the columns of the tile's own experts instead of all R.  For each of
these experts, H is gathered from the slots in registers: with the zeros of a tile it would be larger,
and every tile of columns reads all of it.  Rows of base and y are gathered and scattered, which is free at
their width.  The second pair is dense: dlogits W.
Reads T*D (base), T*K*(r + 2) and the rows of B of every tile's experts, writes T*D.

Letters: T tokens, E experts, K slots per token, R rank rows, r the largest rank, L experts a tile may hold, D
columns of y.
"""

import triton
import triton.language as tl

from .expand import add_product, rank_step
from .launching import launch, precision
from .numerics import dot, matched, round_to, widen
from .operands import rows_contiguous
from .segmented_shrink import sharing

UNROLLED = tl.constexpr(
    8
)  # slots; a loop over more of them keeps the loop over ranks from being pipelined


@triton.jit(do_not_specialize=["T"])
def _segmented_expand_kernel(
    s_ptr,  # S or dS (T, K, r), or S (T, r) shared by the experts
    indices_ptr,  # (T, K)
    weights_ptr,  # (T, K), or None: S includes its gate
    scaling_ptr,  # (E,)
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
    r,
    R2,
    D,
    BLOCKS,  # of columns; one axis of the grid takes any number of tiles, the others at most 65,535
    K: tl.constexpr,
    SHARED: tl.constexpr,
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

    y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, number * TILE_R, BLOCK_R):
        e = tl.load(experts_ptr + first // TILE_R)
        c = first % TILE_R + tl.arange(0, BLOCK_R)
        if offsets_ptr is None:
            start = e * rank
            stop = start + rank
        else:
            start = tl.load(offsets_ptr + e)
            stop = tl.load(offsets_ptr + e + 1)
        row = start + c
        h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
        if K <= UNROLLED:
            for j in tl.static_range(K):
                h = add_slot(
                    h, s_ptr, indices_ptr, weights_ptr, scaling_ptr, t, t_ok, j, e, c, r, K, SHARED
                )
        else:
            for j in range(K):
                h = add_slot(
                    h, s_ptr, indices_ptr, weights_ptr, scaling_ptr, t, t_ok, j, e, c, r, K, SHARED
                )
        b = b_ptr + row[:, None].to(tl.int64) * stride_br + d[None, :]
        b = tl.load(b, mask=(row < stop)[:, None] & (d < D)[None, :], other=0.0)
        h, b = matched(round_to(h, y_ptr.dtype.element_ty), b, y_ptr.dtype.element_ty)
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


@triton.jit
def add_slot(
    h,
    s_ptr,
    indices_ptr,
    weights_ptr,
    scaling_ptr,
    t,
    t_ok,
    j,
    e,
    c,
    r,
    K: tl.constexpr,
    SHARED: tl.constexpr,
):
    """h + S_tj g_tj s_e of the tokens whose slot j names e, columns c."""
    slot = t * K + j
    mine = tl.load(indices_ptr + slot, mask=t_ok, other=-1) == e
    at = t if SHARED else slot
    s = tl.load(s_ptr + at[:, None] * r + c, mask=mine[:, None] & (c < r), other=0.0)
    s = widen(s)
    if weights_ptr is not None:
        factor = tl.load(weights_ptr + slot, mask=mine, other=0.0) * tl.load(scaling_ptr + e)
        s = tl.where((factor != 0)[:, None], s * factor[:, None], 0.0)
    return h + s


def segmented_expand(s, routing, b, h2, b2, base, segments, experts, dtype):
    """y (T, D) in dtype, from S by slot; routing.weights None: S includes its gate."""
    order, listed, number, tile = segments
    indices, weights, *_ = routing
    (T, K), D = indices.shape, b.shape[1]
    y = s.new_empty(T, D, dtype=dtype)
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
        y,
        _segmented_expand_kernel,
        (blocks * len(number),),
        *(s, indices, weights, experts.scaling, b, b.stride(0), *second),
        *(base, 0 if base is None else base.stride(0), y),
        *(order, listed, number, experts.offsets, experts.rank),
        *(T, len(experts.scaling), listed.shape[1], experts.largest),
        *(0 if b2 is None else len(b2), D, blocks),
        K=K,
        SHARED=experts.shared_a,
        SHARE=1 if base is None else sharing(T, base),
        TILE_R=experts.own_columns,
        BLOCK_T=tile["BLOCK_T"],
        BLOCK_D=tile["BLOCK_N"],
        BLOCK_R=min(rank_step(y, b), experts.own_columns),
        BLOCK_R2=16 if b2 is None else rank_step(h2, b2),
        PRECISION=precision(y),
        num_warps=tile["num_warps"],
        num_stages=tile["num_stages"],
    )
    return y
