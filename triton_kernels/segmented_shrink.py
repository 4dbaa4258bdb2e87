"""Shrink by picked experts only, on tiles of sorted tokens:  S_tj = A_e x_t,  e = ids_tj

With tokens of the same experts next to each other, a tile holds few of the E experts.  A program owns a
tile and a block of the rank columns of the experts on its list; blocks past the end of the list exit at
once.  S is written slot by slot: for `segmented_expand`, and to be saved.
Reads T*D and the rows of A of the tile's experts, writes 4*T*K*r.

Letters: T tokens, E experts, K slots per token, R rank rows, r the largest rank, L experts a tile may hold,
D columns of x.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .gating import by_expert
from .launching import launch, precision
from .list_experts import list_experts
from .numerics import in_first, project
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
    x_ptr,  # (T // SHARE, D)
    stride_xt,
    a_ptr,  # (R, D)
    stride_ar,
    order_ptr,  # (T,)
    experts_ptr,  # (tiles, L)
    number_ptr,  # (tiles,)
    indices_ptr,  # (T, K)
    offsets_ptr,  # (E+1,), or None: every expert has `rank` rows
    rank,
    s_ptr,  # (T, K, r)
    T,
    E,
    L,
    D,
    r,
    BLOCKS,  # per tile; one axis of the grid takes any number of tiles, the others at most 65,535
    K: tl.constexpr,
    SHARE: tl.constexpr,  # consecutive tokens that read the same row of x
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

    s, _ = project(
        x_ptr, stride_xt, t // SHARE, t_ok, a_ptr, stride_ar, row, row_ok, None, 0, e, e_ok,
        0, D, BLOCK_D, PRECISION,
    )  # fmt: skip
    s = tl.where(row_ok[None, :], s, 0.0)

    c = tl.arange(0, TILE_R)[None, :]
    for j in range(K):
        index = tl.load(indices_ptr + t * K + j, mask=t_ok, other=-1)
        hit = (index[:, None] == e[None, :]) & e_ok[None, :]
        empty = in_first((index < 0) | (index >= E), block)  # one program writes the zeros
        mine = t_ok & (empty | (tl.max(hit.to(tl.int32), 1) == 1))
        value = tl.sum(tl.where(hit[:, :, None], by_expert(s, TILE_R), 0.0), 1)
        at = (t * K + j)[:, None] * r + c
        tl.store(s_ptr + at, value, mask=mine[:, None] & (c < r))


class Segments(NamedTuple):
    """Tokens ordered so that equal experts are together, and the experts of every tile."""

    order: torch.Tensor  # (T,)
    experts: torch.Tensor  # (tiles, L)
    number: torch.Tensor  # (tiles,)
    tile: dict  # BLOCK_T and the other launch options

    def experts_at_once(self, TILE_R):
        """How many of a tile's experts one program handles, a power of two."""
        L = self.experts.shape[1]
        return max(1, min(triton.next_power_of_2(L), self.tile["COLUMNS"] // TILE_R))


def sharing(n, v):
    """How many of n consecutive tokens read the same row of v: the slots of slots.py do."""
    return max(1, n // max(1, len(v)))


def segments_of(x, indices, experts, tiles="segmented"):
    E = len(experts.scaling)
    tile = choose(tiles, x, experts.own_columns)
    order = sort_tokens(indices, E, tile["BLOCK_T"])
    return Segments(order, *list_experts(indices, order, E, tile["BLOCK_T"]), tile)


def segmented_shrink(x, a, indices, experts, segments):
    """S (T, K, r) fp32."""
    (T, K), (tiles, L) = indices.shape, segments.experts.shape
    s = x.new_empty(T, K, experts.largest, dtype=torch.float32)
    TILE_E = segments.experts_at_once(experts.own_columns)
    launch(
        x,
        _segmented_shrink_kernel,
        (triton.cdiv(L, TILE_E) * tiles,),
        *(x, x.stride(0), a, a.stride(0), *segments[:3], indices),
        *(experts.offsets, experts.rank, s),
        *(T, len(experts.scaling), L, x.shape[1], experts.largest, triton.cdiv(L, TILE_E)),
        K=K,
        SHARE=sharing(T, x),
        TILE_E=TILE_E,
        TILE_R=experts.own_columns,
        PRECISION=precision(x),
        **{k: v for k, v in segments.tile.items() if k not in ("COLUMNS", "BLOCK_N")},
    )
    return s
