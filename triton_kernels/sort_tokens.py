"""A stable counting sort by expert, window by window, in which the host never waits for a count:

    position of an item = items of the window with a smaller key + those with its key in earlier blocks
                          + those with its key before it in its block

`count_keys` writes the number of each key in every block of the window; here a program adds up what its
items need.  The work is linear in the items, the order is that of any stable sort, and the kernel needs
neither atomics nor recompilation for new counts.  It sorts slots by expert, which also gives the start
of each expert's slots, or tokens by the two experts of their first two slots, so that a tile of
neighbors holds few different experts: by the higher one first, then by the lower, as in a radix sort.
Reads 4*N*K bytes and, per block, the window's counts; writes 4*N or 4*(N + E + 1).

Letters: E experts, K slots per token, N items: T tokens or T*K slots.
"""

import torch
import triton
import triton.language as tl

from .count_keys import ITEMS, count_keys, items_and_keys
from .launching import launch
from .numerics import in_first
from .tiles import sort_window


@triton.jit(do_not_specialize=["N", "blocks"])
def _sort_tokens_kernel(
    indices_ptr,  # (T, K)
    source_ptr,  # (N,) items in the order of an earlier sort, or None: in index order
    counts_ptr,  # (blocks, E+1)
    order_ptr,  # (N,)
    starts_ptr,  # (windows, E+1), or None
    N,
    blocks,
    E,
    K: tl.constexpr,
    BY: tl.constexpr,
    ITEMS: tl.constexpr,
    WINDOW: tl.constexpr,  # blocks per window
    BLOCK_E: tl.constexpr,
):
    block = tl.program_id(0)
    window = block // WINDOW
    at = block * ITEMS + tl.arange(0, ITEMS)
    item, key = items_and_keys(indices_ptr, source_ptr, at, at < N, E, K, BY)
    i = tl.arange(0, ITEMS)
    alike = (key[None, :] == key[:, None]) & (i[None, :] < i[:, None])
    place = tl.sum(alike.to(tl.int32), 1)

    other = window * WINDOW + tl.arange(0, WINDOW)
    smaller = 0
    for first in range(0, E + 1, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        counts = counts_ptr + other[:, None].to(tl.int64) * (E + 1) + e[None, :]
        counts = tl.load(counts, mask=(other < blocks)[:, None] & (e <= E)[None, :], other=0)
        number = tl.sum(counts, 0)
        before = tl.sum(tl.where((other < block)[:, None], counts, 0), 0)
        start = smaller + tl.sum(tl.where(e[None, :] < e[:, None], number[None, :], 0), 1)
        smaller += tl.sum(number, 0)
        mine = key[:, None] == e[None, :]
        place += tl.sum(tl.where(mine, (start + before)[None, :], 0), 1)
        if starts_ptr is not None:
            opens = in_first(e <= E, block % WINDOW)
            tl.store(starts_ptr + window.to(tl.int64) * (E + 1) + e, start, mask=opens)

    tl.store(order_ptr + window * (WINDOW * ITEMS) + place, item, mask=at < N)


def sort_tokens(indices, E, tile):
    """order (T,) int32, with equal experts next to each other.  A single tile of tokens is not sorted."""
    T, K = indices.shape
    if tile >= T:
        return torch.arange(T, dtype=torch.int32, device=indices.device)
    order = _sort(indices, None, T, E, "higher")[0] if K > 1 else None
    return _sort(indices, order, T, E, "lower")[0]


def sort_slots(indices, E):
    """order (T*K,) int32 of slots t*K + j, and the start of each expert's slots by window (windows, E+1)."""
    return _sort(indices, None, indices.numel(), E, "slot")


def _sort(indices, source, N, E, by):
    window = sort_window(by)
    counts, order = count_keys(indices, source, N, E, by), indices.new_empty(N)
    starts = indices.new_empty(triton.cdiv(N, window), E + 1) if by == "slot" else None
    launch(
        indices,
        _sort_tokens_kernel,
        (len(counts),),
        *(indices, source, counts, order, starts, N, len(counts), E),
        K=indices.shape[1],
        BY=by,
        ITEMS=ITEMS,
        WINDOW=window // ITEMS,
        BLOCK_E=32,
        num_warps=8,
    )
    return order, starts
