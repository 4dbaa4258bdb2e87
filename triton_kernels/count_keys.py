"""The number of a block's items with each key: the first half of the sort in sort_tokens.py.

Items are slots, keyed by their expert, or tokens, keyed by the lower or higher expert of their first two
slots. Ids that name no expert count as E, so such items come last. Reads 4*N*K bytes, writes
4*blocks*(E+1).

Letters: E experts, K slots per token, N items: T tokens or T*K slots.
"""

import triton
import triton.language as tl

from .launching import launch
from .numerics import INTERPRETED

ITEMS = 64 if INTERPRETED else 128  # per block


@triton.jit
def items_and_keys(indices_ptr, source_ptr, at, at_ok, E, K: tl.constexpr, BY: tl.constexpr):
    """The items at these positions, and their sort keys."""
    item = at
    if source_ptr is not None:
        item = tl.load(source_ptr + at, mask=at_ok, other=0)
    first = item.to(tl.int64)
    if BY != "slot":
        first *= K
    key = _expert(indices_ptr + first, at_ok, E)
    if BY != "slot" and K > 1:  # the order of the two does not matter
        other = _expert(indices_ptr + first + 1, at_ok, E)
        if BY == "lower":
            key = tl.minimum(key, other)
        else:
            key = tl.maximum(key, other)
    return item, key


@triton.jit
def _expert(ptr, ok, E):
    e = tl.load(ptr, mask=ok, other=-1)
    return tl.where((e >= 0) & (e < E), e, E)


@triton.jit(do_not_specialize=["N"])
def _count_keys_kernel(
    indices_ptr,  # (T, K)
    source_ptr,  # (N,) items in the order of an earlier sort, or None: in index order
    counts_ptr,  # (blocks, E+1)
    N,
    E,
    K: tl.constexpr,
    BY: tl.constexpr,
    ITEMS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    at = (block * ITEMS + tl.arange(0, ITEMS)).to(tl.int32)
    _, key = items_and_keys(indices_ptr, source_ptr, at, at < N, E, K, BY)
    for first in range(0, E + 1, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        hit = (key[:, None] == e[None, :]) & (at < N)[:, None]
        tl.store(counts_ptr + block * (E + 1) + e, tl.sum(hit.to(tl.int32), 0), mask=e <= E)


def count_keys(indices, source, N, E, by):
    """counts (blocks, E+1) int32."""
    counts = indices.new_empty(triton.cdiv(N, ITEMS), E + 1)
    launch(
        indices,
        _count_keys_kernel,
        (len(counts),),
        *(indices, source, counts, N, E),
        K=indices.shape[1],
        BY=by,
        ITEMS=ITEMS,
        BLOCK_E=32,
    )
    return counts
