"""Shrink by picked experts only, forward and backward to rank space, on tiles of sorted tokens:

    S = x A^T, H = S g s          G = dy B^T, dS = G g s, H = S g s, dw_tj = s_e sum over r of e of G S

With tokens of the same experts next to each other, a tile holds few of the E experts.  A program owns a
tile and a block of the rank columns of the experts on its list; blocks past the end of the list exit at
once.  The result is written twice: slot by slot, to be saved and for the gradients of A and B, and tile
by tile, with rows and columns as they are in registers, as input of `segmented_expand`. Reads T*D and
the rows of A of the tile's experts, writes 4*T*K*r and T*(columns of the tile).

Letters: T tokens, E experts, K slots per token, R rank rows, r the largest rank, L experts a tile may hold,
D columns of x.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .gating import apply_gate, by_expert, scatter_slots
from .launching import launch, precision
from .list_experts import list_experts
from .numerics import in_first, project, round_to
from .sort_tokens import sort_tokens
from .tiles import choose


@triton.jit
def listed_rows(
    offsets_ptr, rank, experts_ptr, number, first, E, COLUMNS: tl.constexpr, TILE_R: tl.constexpr
):
    """Rows of A for the rank columns first.. of a tile's experts, and whether they exist."""
    column = first + tl.arange(0, COLUMNS)
    listed = column // TILE_R < number
    e = tl.load(experts_ptr + column // TILE_R, mask=listed, other=0)
    if offsets_ptr is None:
        start = e * rank
        stop = start + rank
    else:
        start = tl.load(offsets_ptr + e, mask=listed, other=0)
        stop = tl.load(offsets_ptr + e + 1, mask=listed, other=0)
    row = start + column % TILE_R
    return row, listed & (row < stop)


@triton.jit(do_not_specialize=["T"])
def _segmented_shrink_kernel(
    x_ptr,  # (T // SHARE, D), or dy
    stride_xt,
    a_ptr,  # (R, D), or B; None: S is given, shared by the experts
    stride_ar,
    order_ptr,  # (T,)
    experts_ptr,  # (tiles, L)
    number_ptr,  # (tiles,)
    indices_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    scaling_ptr,  # (E,)
    offsets_ptr,  # (E+1,), or None: every expert has `rank` rows
    rank,
    s_ptr,  # (T, K, r), or (T, r) shared; written forward, read backward
    tile_ptr,  # (tiles, BLOCK_T, L*TILE_R): H forward, dS backward; or None
    ds_ptr,  # (T, K, r), backward only
    h_ptr,  # (T, K, r), backward only
    dweights_ptr,  # (T, K), backward only
    T,
    E,
    L,
    D,
    r,
    BLOCKS,  # per tile; one axis of the grid takes any number of tiles, the others at most 65,535
    K: tl.constexpr,
    SHARE: tl.constexpr,  # consecutive tokens that read the same row of x
    BACKWARD: tl.constexpr,
    SHARED: tl.constexpr,
    TILE_E: tl.constexpr,
    TILE_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    number = tl.load(number_ptr + tile)
    if (block > 0) & (block * TILE_E >= number):
        return
    i = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok = i < T
    t = tl.load(order_ptr + i, mask=t_ok, other=0).to(tl.int64)
    experts_ptr += tile * L
    slot = block * TILE_E + tl.arange(0, TILE_E)
    e_ok = slot < number
    e = tl.load(experts_ptr + slot, mask=e_ok, other=0)
    row, row_ok = listed_rows(
        offsets_ptr, rank, experts_ptr, number, block * TILE_E * TILE_R, E, TILE_E * TILE_R, TILE_R
    )

    if a_ptr is None:
        c = tl.arange(0, TILE_R)
        s = tl.load(s_ptr + t[:, None] * r + c, mask=t_ok[:, None] & (c < r)[None, :], other=0.0)
    else:
        s, _ = project(
            x_ptr, stride_xt, t // SHARE, t_ok, a_ptr, stride_ar, row, row_ok, None, 0, e, e_ok,
            0, D, BLOCK_D, PRECISION,
        )  # fmt: skip
        s = tl.where(row_ok[None, :], s, 0.0)

    if tile_ptr is not None:
        gate = scatter_slots(indices_ptr, weights_ptr, t, t_ok, e, e_ok, K)
        gate *= tl.load(scaling_ptr + e, mask=e_ok, other=0.0)[None, :]
        gated = round_to(apply_gate(s, gate, TILE_E, TILE_R), tile_ptr.dtype.element_ty)
        column = block * TILE_E * TILE_R + tl.arange(0, TILE_E * TILE_R)
        tile_ptr += tile * BLOCK_T * (L * TILE_R)
        in_tile = tl.arange(0, BLOCK_T)[:, None] * (L * TILE_R) + column[None, :]
        tl.store(
            tile_ptr + in_tile, gated, mask=t_ok[:, None] & (column < number * TILE_R)[None, :]
        )

    c = tl.arange(0, TILE_R)[None, :]
    for j in range(K):
        index = tl.load(indices_ptr + t * K + j, mask=t_ok, other=-1)
        hit = (index[:, None] == e[None, :]) & e_ok[None, :]
        empty = in_first((index < 0) | (index >= E), block)  # one program writes the zeros
        mine = t_ok & (empty | (tl.max(hit.to(tl.int32), 1) == 1))
        at = (t * K + j)[:, None] * r + c
        inside = mine[:, None] & (c < r)
        value = tl.sum(tl.where(hit[:, :, None], by_expert(s, TILE_R), 0.0), 1)
        if BACKWARD:
            if SHARED:
                saved = tl.load(s_ptr + t[:, None] * r + c, mask=inside, other=0.0)
            else:
                saved = tl.load(s_ptr + at, mask=inside, other=0.0)
            weight = tl.load(weights_ptr + t * K + j, mask=mine & (empty == 0), other=0.0)
            scale = tl.load(scaling_ptr + index, mask=mine & (empty == 0), other=0.0)
            factor = (weight * scale)[:, None]
            ds = tl.where(factor != 0, value * factor, 0.0)
            h = tl.where(factor != 0, saved * factor, 0.0)
            tl.store(ds_ptr + at, round_to(ds, ds_ptr.dtype.element_ty), mask=inside)
            tl.store(h_ptr + at, round_to(h, h_ptr.dtype.element_ty), mask=inside)
            dweight = tl.where(empty, 0.0, scale * tl.sum(value * saved, 1))
            tl.store(dweights_ptr + t * K + j, dweight, mask=mine)
        elif not SHARED:
            tl.store(s_ptr + at, value, mask=inside)


class Segments(NamedTuple):
    """Tokens ordered so that equal experts are together, and the experts of every tile."""

    order: torch.Tensor  # (T,)
    experts: torch.Tensor  # (tiles, L)
    number: torch.Tensor  # (tiles,)
    tile: dict  # BLOCK_T and the other launch options

    def new_columns(self, like, TILE_R):
        """Space for the rank columns of every tile's experts, (tiles, BLOCK_T, L*TILE_R); some unused."""
        tiles, L = self.experts.shape
        return like.new_empty(tiles, self.tile["BLOCK_T"], L * TILE_R)

    def experts_at_once(self, TILE_R):
        """How many of a tile's experts one program handles, a power of two."""
        L = self.experts.shape[1]
        return max(1, min(triton.next_power_of_2(L), self.tile["COLUMNS"] // TILE_R))


def sharing(n, v):
    """How many of n consecutive tokens read the same row of v: the slots of slots.py do."""
    return max(1, n // max(1, len(v)))


def segments_of(x, indices, experts):
    E = len(experts.scaling)
    tile = choose("segmented", x, experts.own_columns)
    order = sort_tokens(indices, E, tile["BLOCK_T"])
    return Segments(order, *list_experts(indices, order, E, tile["BLOCK_T"]), tile)


def segmented_shrink(x, a, s, routing, experts, segments, in_tiles=True):
    """S (T, K, r) fp32, or the given S (T, r) of a shared A; and H tile by tile, in x's dtype."""
    T, K = routing.indices.shape
    columns = segments.new_columns(x, experts.own_columns) if in_tiles else None
    if s is None:
        s = x.new_empty(T, K, experts.largest, dtype=torch.float32)
        source = x, x.stride(0), a, a.stride(0)
    else:
        source = x, 0, None, 0
    _launch(source, routing, s, (columns, None, None, None), experts, segments, x.shape[1], False)
    return s, columns


def segmented_rank_gradient(dy, s, routing, experts, segments, in_tiles=True):
    """dS tile by tile; dS and H (T, K, r); dweights (T, K)."""
    b, (T, K) = experts.b, routing.indices.shape
    columns = segments.new_columns(dy, experts.own_columns) if in_tiles else None
    # with a shared A, the gradient is summed over a token's slots before it is rounded
    kind = torch.float32 if experts.shared_a else dy.dtype
    ds = dy.new_empty(T, K, experts.largest, dtype=kind)
    out = columns, ds, dy.new_empty(ds.shape), torch.empty_like(routing.weights)
    source = dy, dy.stride(0), b, b.stride(0)
    _launch(source, routing, s, out, experts, segments, dy.shape[1], True)
    return out


def _launch(source, routing, s, out, experts, segments, D, backward):
    (T, K), (tiles, L) = routing.indices.shape, segments.experts.shape
    TILE_E = segments.experts_at_once(experts.own_columns)
    launch(
        source[0],
        _segmented_shrink_kernel,
        (triton.cdiv(L, TILE_E) * tiles,),
        *(*source, *segments[:3], routing.indices, routing.weights),
        *(experts.scaling, experts.offsets, experts.rank, s, *out),
        *(T, len(experts.scaling), L, D, experts.largest, triton.cdiv(L, TILE_E)),
        K=K,
        SHARE=sharing(T, source[0]),
        BACKWARD=backward,
        SHARED=experts.shared_a,
        TILE_E=TILE_E,
        TILE_R=experts.own_columns,
        PRECISION=precision(source[0]),
        **{k: v for k, v in segments.tile.items() if k not in ("COLUMNS", "BLOCK_N")},
    )
