"""Backward to rank space by picked experts only, on slots sorted by expert.  Slot j of token t names e:

    G = dy_t B_e^T      dS = G g s      H = S g s      dw = s_e * sum over r rows of G S

A program owns a tile of slots that all name one expert, so it reads that expert's rows of B once and
multiplies nothing by zero; it gathers the rows of dy.  Experts have as many tiles as their slots need:
each program finds its own from where the experts' slots start, and those left over exit.  Empty slots
come last and get zeros.  Reads T*K*D and, per tile, the rows of one expert of B, writes 4*T*K*(r + 1).

Letters: E experts, K slots per token, N slots of all tokens, R rank rows, r the largest rank, D columns
of dy.
"""

import torch
import triton
import triton.language as tl

from .launching import launch, precision
from .numerics import in_first, project, round_to
from .segmented_shrink import sharing
from .tiles import choose


@triton.jit
def tile_of_slots(starts_ptr, tile, items, E, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr):
    """A tile's expert (E: empty slots, above: none), its first slot, and where its expert's slots end."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(starts_ptr + e, mask=e <= E, other=items)
    stop = tl.load(starts_ptr + e + 1, mask=e < E, other=items)
    tiles = tl.cdiv(stop - start, BLOCK_T)
    expert = tl.sum((tl.cumsum(tiles) <= tile).to(tl.int32))
    mine = e == expert
    before = tl.sum(tl.where(e < expert, tiles, 0))
    first = tl.sum(tl.where(mine, start, 0)) + (tile - before) * BLOCK_T
    return expert, first, tl.sum(tl.where(mine, stop, 0))


@triton.jit(do_not_specialize=["N"])
def _segmented_rank_gradient_kernel(
    dy_ptr,  # (N // SHARE, D)
    stride_dyt,
    b_ptr,  # (R, D)
    stride_br,
    order_ptr,  # (N,)
    starts_ptr,  # (windows, E+1)
    window_size,
    weights_ptr,  # (N,)
    scaling_ptr,  # (E,)
    offsets_ptr,  # (E+1,), or None: every expert has `rank` rows
    rank,
    s_ptr,  # (N // SHARE_S, r)
    ds_ptr,  # (N, r)
    h_ptr,  # (N, r)
    dweights_ptr,  # (N,)
    N,
    E,
    D,
    r,
    SHARE: tl.constexpr,  # consecutive slots that read the same row of dy
    SHARE_S: tl.constexpr,  # the same of S: with a shared A, a token has one
    TILE_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    window = tl.program_id(1).to(tl.int64)
    items = tl.minimum(N - window * window_size, window_size).to(tl.int32)
    starts_ptr += window * (E + 1)
    e, first, last = tile_of_slots(starts_ptr, tl.program_id(0), items, E, BLOCK_E, BLOCK_T)
    if e > E:
        return
    i = first + tl.arange(0, BLOCK_T)
    ok = i < last
    slot = tl.load(order_ptr + window * window_size + i, mask=ok, other=0).to(tl.int64)
    known = in_first(ok, e // E)
    if offsets_ptr is None:
        start = e * rank
        stop = start + rank
    else:
        start = tl.load(offsets_ptr + tl.minimum(e, E - 1))
        stop = tl.load(offsets_ptr + tl.minimum(e, E - 1) + 1)
    c = tl.arange(0, TILE_R)
    row = start + c
    row_ok = in_first(row < stop, e // E)

    none = tl.arange(0, 16)
    g, _ = project(
        dy_ptr, stride_dyt, slot // SHARE, known, b_ptr, stride_br, row, row_ok, None, 0, none,
        none < 0, 0, tl.where(e < E, D, 0), BLOCK_D, PRECISION,
    )  # fmt: skip
    g = tl.where(row_ok[None, :], g, 0.0)

    inside = ok[:, None] & (c < r)[None, :]
    s = s_ptr + (slot // SHARE_S)[:, None] * r + c
    s = tl.load(s, mask=inside & row_ok[None, :], other=0.0)
    scale = tl.load(scaling_ptr + tl.minimum(e, E - 1))
    factor = (tl.load(weights_ptr + slot, mask=known, other=0.0) * scale)[:, None]
    ds = tl.where(factor != 0, g * factor, 0.0)
    h = tl.where(factor != 0, s * factor, 0.0)
    at = slot[:, None] * r + c
    tl.store(ds_ptr + at, round_to(ds, ds_ptr.dtype.element_ty), mask=inside)
    tl.store(h_ptr + at, round_to(h, h_ptr.dtype.element_ty), mask=inside)
    dweights = tl.where(known, scale * tl.sum(g * s, 1), 0.0)
    tl.store(dweights_ptr + slot, dweights, mask=ok)


def segmented_rank_gradient(dy, s, routing, experts, slots):
    """dS and H (T, K, r), dweights (T, K); `slots` as `sorted_slots` returns them."""
    order, starts, window = slots
    b, r, N = experts.b, experts.largest, len(order)
    # with a shared A, the gradient is summed over a token's slots before it is rounded
    kind = torch.float32 if experts.shared_a else dy.dtype
    ds = dy.new_empty(*routing.indices.shape, r, dtype=kind)
    h, dweights = dy.new_empty(ds.shape), torch.empty_like(routing.weights)
    if N == 0:
        return ds, h, dweights
    E, TILE_R = len(experts.scaling), experts.own_columns
    tile = choose("segmented_rank_gradient", dy, TILE_R)
    tiles = triton.cdiv(min(N, window), tile["BLOCK_T"]) + E
    launch(
        dy,
        _segmented_rank_gradient_kernel,
        (tiles, len(starts)),
        *(dy, dy.stride(0), b, b.stride(0), order, starts, window, routing.weights),
        *(experts.scaling, experts.offsets, experts.rank, s, ds, h, dweights),
        *(N, E, b.shape[1], r),
        SHARE=sharing(N, dy),
        SHARE_S=sharing(N, s) if experts.shared_a else 1,
        TILE_R=TILE_R,
        BLOCK_E=triton.next_power_of_2(E + 1),
        PRECISION=precision(dy),
        **tile,
    )
    return ds, h, dweights
