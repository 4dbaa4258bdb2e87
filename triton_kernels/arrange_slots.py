"""From slots to tiles of sorted tokens:  H_te = sum over slots j that name e of  S_tj g_tj s_e

Makes the input of `segmented_expand` if each of a token's slots was shrunk separately, from its own x or dy.
dS by slot already includes its gate.  Rounds once, after the sum.
Reads T*K*r numbers, writes T*(columns of the tile).

Letters: T tokens, E experts, K slots per token, r the largest rank, L experts a tile may hold.
"""

import triton
import triton.language as tl

from .launching import launch
from .numerics import round_to, widen


@triton.jit(do_not_specialize=["T"])
def _arrange_slots_kernel(
    s_ptr,  # (T, K, r)
    order_ptr,  # (T,)
    experts_ptr,  # (tiles, L)
    number_ptr,  # (tiles,)
    indices_ptr,  # (T, K)
    weights_ptr,  # (T, K), or None: S includes its gate
    scaling_ptr,  # (E,)
    tile_ptr,  # (tiles, BLOCK_T, L*TILE_R)
    T,
    L,
    r,
    BLOCKS,  # per tile
    K: tl.constexpr,
    TILE_E: tl.constexpr,
    TILE_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tile = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    number = tl.load(number_ptr + tile)
    if block * TILE_E >= number:
        return
    i = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok = i < T
    t = tl.load(order_ptr + i, mask=t_ok, other=0).to(tl.int64)
    place = block * TILE_E + tl.arange(0, TILE_E)
    e_ok = place < number
    e = tl.load(experts_ptr + tile * L + place, mask=e_ok, other=0)
    c = tl.arange(0, TILE_R)[None, :]

    h = tl.zeros((BLOCK_T, TILE_E, TILE_R), tl.float32)
    for j in range(K):
        slot = t * K + j
        index = tl.load(indices_ptr + slot, mask=t_ok, other=-1)
        hit = (index[:, None] == e[None, :]) & e_ok[None, :]
        mine = tl.max(hit.to(tl.int32), 1) == 1
        s = s_ptr + slot[:, None] * r + c
        s = widen(tl.load(s, mask=mine[:, None] & (c < r), other=0.0))
        if weights_ptr is not None:
            factor = tl.load(weights_ptr + slot, mask=mine, other=0.0)
            factor *= tl.load(scaling_ptr + index, mask=mine, other=0.0)
            s = tl.where((factor != 0)[:, None], s * factor[:, None], 0.0)
        h += tl.where(hit[:, :, None], s[:, None, :], 0.0)

    column = block * TILE_E * TILE_R + tl.arange(0, TILE_E * TILE_R)
    h = round_to(tl.reshape(h, (BLOCK_T, TILE_E * TILE_R)), tile_ptr.dtype.element_ty)
    tile_ptr += tile * BLOCK_T * (L * TILE_R)
    at = tl.arange(0, BLOCK_T)[:, None] * (L * TILE_R) + column[None, :]
    tl.store(tile_ptr + at, h, mask=t_ok[:, None] & (column < number * TILE_R)[None, :])


def arrange_slots(s, weights, indices, experts, segments, like):
    """(tiles, BLOCK_T, L*TILE_R) in like's dtype, from s (T, K, r); weights None: s includes its gate."""
    (T, K), (tiles, L), TILE_R = indices.shape, segments.experts.shape, experts.own_columns
    out, TILE_E = segments.new_columns(like, TILE_R), segments.experts_at_once(TILE_R)
    launch(
        s,
        _arrange_slots_kernel,
        (triton.cdiv(L, TILE_E) * tiles,),
        *(s, *segments[:3], indices, weights, experts.scaling, out),
        *(T, L, experts.largest, triton.cdiv(L, TILE_E)),
        K=K,
        TILE_E=TILE_E,
        TILE_R=TILE_R,
        BLOCK_T=segments.tile["BLOCK_T"],
        num_warps=segments.tile["num_warps"],
    )
    return out
