"""Sums over splits:  out = partial[0] + partial[1] + ...,  always in this order, rounded once to out's dtype.

Programs write partial sums to separate places instead of accumulating into one, so that the result does not
depend on the schedule.  One launch handles up to three sums.  Reads SPLITS*N, writes N.

Letters: N elements of a sum.
"""

import triton
import triton.language as tl

from .launching import launch
from .numerics import INTERPRETED, round_to

MOST = 3


@triton.jit(do_not_specialize=["splits0", "N0", "splits1", "N1", "splits2", "N2"])
def _add_splits_kernel(
    partial0_ptr,  # (SPLITS, N), fp32 or int32
    out0_ptr,  # (N,)
    splits0,
    N0,
    partial1_ptr,  # or None
    out1_ptr,
    splits1,
    N1,
    partial2_ptr,
    out2_ptr,
    splits2,
    N2,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    if which == 0:
        _add(partial0_ptr, out0_ptr, splits0, N0, n, ALIGNED)
    elif which == 1:
        if partial1_ptr is not None:
            _add(partial1_ptr, out1_ptr, splits1, N1, n, ALIGNED)
    else:
        if partial2_ptr is not None:
            _add(partial2_ptr, out2_ptr, splits2, N2, n, ALIGNED)


@triton.jit
def _add(partial_ptr, out_ptr, splits, N, n, ALIGNED: tl.constexpr):
    if ALIGNED:
        N = tl.multiple_of(N, 16)
    total = tl.zeros(n.shape, partial_ptr.dtype.element_ty)
    for _split in range(splits):
        total += tl.load(partial_ptr + n, mask=n < N, other=0)
        partial_ptr += N
    if total.dtype == tl.float32:
        total = round_to(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + n, total, mask=n < N)


def add_splits(*pairs, by_token=False):
    """Fill `out` of every pair (partial, out).

    Tensors with one row per token are not specialized on alignment: it depends on T, and a new T would
    recompile.
    """
    pairs = [(partial, out) for partial, out in pairs if out.numel()]
    if not pairs:
        return
    block = 16384 if INTERPRETED else 1024
    args = [v for partial, out in pairs for v in (partial, out, len(partial), out.numel())]
    launch(
        pairs[0][0],
        _add_splits_kernel,
        (triton.cdiv(max(out.numel() for _, out in pairs), block), len(pairs)),
        *args,
        *(None, None, 0, 0) * (MOST - len(pairs)),
        ALIGNED=not by_token and all(out.numel() % 16 == 0 for _, out in pairs),
        BLOCK=block,
    )
