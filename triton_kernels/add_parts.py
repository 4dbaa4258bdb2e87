"""Sums of parts:  out = parts[0] + parts[1] + ...,  always in this order, rounded once to out's dtype.

Programs write partial sums to separate places instead of accumulating into one, so that the result does not
depend on the schedule.  One launch handles up to three sums.  Reads PARTS*N, writes N.

Letters: N elements of a sum.
"""

import triton
import triton.language as tl

from .launching import launch
from .numerics import INTERPRETED, round_to

MOST = 3


@triton.jit(do_not_specialize=["parts0", "N0", "parts1", "N1", "parts2", "N2"])
def _add_parts_kernel(
    parts0_ptr,  # (PARTS, N), fp32 or int32
    out0_ptr,  # (N,)
    parts0,
    N0,
    parts1_ptr,  # or None
    out1_ptr,
    parts1,
    N1,
    parts2_ptr,
    out2_ptr,
    parts2,
    N2,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    if which == 0:
        _add(parts0_ptr, out0_ptr, parts0, N0, n, ALIGNED)
    elif which == 1:
        if parts1_ptr is not None:
            _add(parts1_ptr, out1_ptr, parts1, N1, n, ALIGNED)
    else:
        if parts2_ptr is not None:
            _add(parts2_ptr, out2_ptr, parts2, N2, n, ALIGNED)


@triton.jit
def _add(parts_ptr, out_ptr, parts, N, n, ALIGNED: tl.constexpr):
    if ALIGNED:
        N = tl.multiple_of(N, 16)
    total = tl.zeros(n.shape, parts_ptr.dtype.element_ty)
    for _part in range(parts):
        total += tl.load(parts_ptr + n, mask=n < N, other=0)
        parts_ptr += N
    if total.dtype == tl.float32:
        total = round_to(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + n, total, mask=n < N)


def add_parts(*pairs, by_token=False):
    """Fill `out` of every pair (parts, out).

    Tensors with one row per token are not specialized on alignment: it depends on T, and a new T would
    recompile.
    """
    pairs = [(parts, out) for parts, out in pairs if out.numel()]
    if not pairs:
        return
    block = 16384 if INTERPRETED else 1024
    args = [v for parts, out in pairs for v in (parts, out, len(parts), out.numel())]
    launch(
        pairs[0][0],
        _add_parts_kernel,
        (triton.cdiv(max(out.numel() for _, out in pairs), block), len(pairs)),
        *args,
        *(None, None, 0, 0) * (MOST - len(pairs)),
        ALIGNED=not by_token and all(out.numel() % 16 == 0 for _, out in pairs),
        BLOCK=block,
    )
