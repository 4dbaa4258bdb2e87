"""The experts that a tile of sorted tokens holds, in ascending order, and their number.

A tile then loops over its own experts only.  The list has a static bound, so the host need not read the
number. Reads 4*T*K bytes, writes 4*tiles*(L + 1).

Letters: T tokens, E experts, K slots per token, L entries of a tile's list: min(E, BLOCK_T * K).
"""

import triton
import triton.language as tl

from .launching import launch


@triton.jit(do_not_specialize=["T"])
def _list_experts_kernel(
    indices_ptr,  # (T, K)
    order_ptr,  # (T,)
    experts_ptr,  # (tiles, L)
    number_ptr,  # (tiles,)
    T,
    E,
    L,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    i = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    t = tl.load(order_ptr + i, mask=i < T, other=0).to(tl.int64)

    number = 0
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        held = tl.zeros((BLOCK_E,), tl.int32)
        for j in range(K):
            index = tl.load(indices_ptr + t * K + j, mask=i < T, other=-1)
            held |= tl.max((index[:, None] == e[None, :]).to(tl.int32), 0)
        held = tl.where(e < E, held, 0)
        # the number of experts before each: a triangular sum, because a scan over so few costs more
        before = tl.sum(tl.where(e[None, :] < e[:, None], held[None, :], 0), 1)
        tl.store(experts_ptr + tile * L + number + before, e, mask=held > 0)
        number += tl.sum(held, 0)
    tl.store(number_ptr + tile, number)


def list_experts(indices, order, E, block_t):
    """experts (tiles, L) and number (tiles,), int32; entries past a tile's number are not written."""
    T, K = indices.shape
    tiles, L = triton.cdiv(T, block_t), min(E, block_t * K)
    experts, number = indices.new_empty(tiles, L), indices.new_empty(tiles)
    launch(
        indices,
        _list_experts_kernel,
        (tiles,),
        *(indices, order, experts, number, T, E, L),
        K=K,
        BLOCK_T=block_t,
        BLOCK_E=64,
    )
    return experts, number
