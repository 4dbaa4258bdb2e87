"""Sort by expert, window by window, in one launch and without a host that waits for a count:

    rank of an item = number of items in its window with a smaller key, or the same key and before it

Counting is quadratic in the window, and still little beside the products that follow; in return the sort
is stable, deterministic for any number of experts, and needs neither atomics nor a scan over programs.
Sorted are either tokens, by the two experts of their first two slots, so that a tile of neighbours holds few
different experts, or slots, by expert, which also yields where each expert's slots start.
Reads 4*T*K bytes, mostly from cache, writes 4*T or 4*(T*K + E + 1).

Letters: T tokens, E experts, K slots a token, N items: T or T*K.
"""

import triton
import triton.language as tl

from .launching import launch
from .numerics import INTERPRETED
from .tiles import sort_window


@triton.jit
def _keys(indices_ptr, i, i_ok, E, K: tl.constexpr, BY: tl.constexpr):
    """What item i sorts by; one without experts comes last.

    Which of a token's two experts comes first makes no difference; ids that are none count as E.
    """
    if BY == "slot":
        key = _expert(indices_ptr + i, i_ok, E)
    elif BY == "expert":
        key = _expert(indices_ptr + i * K, i_ok, E)
    else:
        one = _expert(indices_ptr + i * K, i_ok, E)
        two = _expert(indices_ptr + i * K + 1, i_ok, E)
        key = tl.minimum(one, two) * (E + 1) + tl.maximum(one, two)
    return key


@triton.jit
def _expert(ptr, ok, E):
    e = tl.load(ptr, mask=ok, other=-1)
    return tl.where((e >= 0) & (e < E), e, E)


@triton.jit(do_not_specialize=["N"])
def _sort_tokens_kernel(
    indices_ptr,  # (T, K)
    order_ptr,  # (N,)
    starts_ptr,  # (windows, E+1), or None
    N,
    E,
    K: tl.constexpr,
    BY: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    window = tl.program_id(1).to(tl.int64)
    first = window * WINDOW
    last = tl.minimum(first + WINDOW, N)
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_item = (mine < WINDOW) & (first + mine < last)
    key = _keys(indices_ptr, first + mine, is_item, E, K, BY)
    before = first + mine
    e = mine - WINDOW
    if BY == "slot":  # past the window's items come the experts, whose rank is where they start
        key = tl.where(e < 0, key, e)
        before = tl.where(e < 0, before, first)

    rank = tl.zeros((BLOCK,), tl.int32)
    for i0 in range(first, last, STEP):
        i = i0 + tl.arange(0, STEP)
        other = _keys(indices_ptr, i, i < last, E, K, BY)[None, :]
        smaller = (other < key[:, None]) | (
            (other == key[:, None]) & (i[None, :] < before[:, None])
        )
        rank += tl.sum((smaller & (i < last)[None, :]).to(tl.int32), 1)

    tl.store(order_ptr + first + rank, (first + mine).to(tl.int32), mask=is_item)
    if BY == "slot":
        tl.store(starts_ptr + window * (E + 1) + e, rank, mask=(e >= 0) & (e <= E))


def sort_tokens(indices, E):
    """order (T,) int32: tokens with the same experts side by side."""
    pairs = indices.shape[1] > 1 and (E + 1) ** 2 < 2**31
    return _launch(indices, len(indices), E, "pair" if pairs else "expert")[0]


def sort_slots(indices, E):
    """order (T*K,) int32 of slots t*K + j, and where each expert's start in a window, (windows, E+1)."""
    return _launch(indices, indices.numel(), E, "slot")


def _launch(indices, N, E, by):
    window, slots = sort_window(N, by), by == "slot"
    block, step = (128, 128) if INTERPRETED else (32, 256)
    windows = triton.cdiv(N, window)
    order = indices.new_empty(N)
    starts = indices.new_empty(windows, E + 1) if slots else None
    launch(
        indices,
        _sort_tokens_kernel,
        (window // block + (triton.cdiv(E + 1, block) if slots else 0), windows),
        *(indices, order, starts, N, E),
        K=indices.shape[1],
        BY=by,
        WINDOW=window,
        BLOCK=block,
        STEP=step,
    )
    return order, starts
