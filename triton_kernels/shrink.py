"""Shrink:  [S | logits] = x @ [A | W]^T, in fp32.

A skinny product: x is the only large operand, so one pass over it computes both products.  The second axis
of the grid shares the ranks; if a program has all of them, x is read once.  The third axis splits D, and the
consumer adds the partial sums in order: with half of D, programs that fill a device have twice the tokens,
so A passes from the L2 cache half as often.  B has the layout of A, so G = dy B^T is a shrink too.
Reads T*D + (R+E)*D, writes 4*SPLITS*T*(R+E) bytes.

Letters: T tokens, E experts, R rank rows of all experts, D columns of x.
"""

import torch
import triton
import triton.language as tl

from .add_splits import add_splits
from .grids import multiprocessors, shrink_shares
from .launching import launch, precision
from .numerics import project, rows_of
from .operands import require_supported, rows_contiguous
from .tiles import choose, padded, rank_sizes, split_of_d


@triton.jit(do_not_specialize=["T", "T_SPLIT"])
def _shrink_kernel(
    x_ptr,  # (T, D)
    stride_xt,
    a_ptr,  # (R, D) or None
    stride_ar,
    w_ptr,  # (E, D) or None
    stride_we,
    s_ptr,  # (SPLITS, T, R)
    logits_ptr,  # (SPLITS, T, E)
    T,
    R,
    E,
    D,
    T_SPLIT,  # tokens per program, at most BLOCK_T
    R_SPLIT,  # ranks per program, at most BLOCK_R
    D_SPLIT,  # columns of x per program
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t0 = tl.program_id(0).to(tl.int64) * T_SPLIT
    t = t0 + tl.arange(0, BLOCK_T)
    t_ok = (t < T) & (tl.arange(0, BLOCK_T) < T_SPLIT)
    row = tl.program_id(1) * R_SPLIT + tl.arange(0, BLOCK_R)
    row_ok = (row < R) & (tl.arange(0, BLOCK_R) < R_SPLIT)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(2)

    s, logits = project(
        x_ptr, stride_xt, t, t_ok, a_ptr, stride_ar, row, row_ok, w_ptr, stride_we, e, e < E,
        split * D_SPLIT, tl.minimum((split + 1) * D_SPLIT, D), BLOCK_D, PRECISION,
    )  # fmt: skip

    t0 += split.to(tl.int64) * T
    if a_ptr is not None:
        inside = t_ok[:, None] & row_ok[None, :]
        tl.store(rows_of(s_ptr, t0, R, row, BLOCK_T), s, mask=inside)
    if w_ptr is not None:
        inside = t_ok[:, None] & (e < E)[None, :]
        tl.store(rows_of(logits_ptr, t0, E, e, BLOCK_T), logits, mask=inside)


def shrink(x, a, w):
    """S (T, R) and logits (T, E); either matrix may be None, and its result then has no columns."""
    return totals(*shrink_splits(x, a, w))


def totals(*partials):
    """The sums over the first axis, that of the splits."""
    if len(partials[0]) == 1:
        return tuple(v[0] for v in partials)
    out = tuple(v.new_empty(v.shape[1:]) for v in partials)
    add_splits(*zip(partials, out), by_token=True)
    return out


def shrink_splits(x, a, w, few_tokens=False):
    """The same with one partial sum per split of D: (SPLITS, T, R), (SPLITS, T, E)."""
    require_supported(x, *(v for v in (a, w) if v is not None))
    x = rows_contiguous(x)
    a, w = (rows_contiguous(v) for v in (a, w))
    (T, D), R, E = x.shape, 0 if a is None else len(a), 0 if w is None else len(w)
    d_split = split_of_d(D, R or E, few_tokens)
    splits = max(1, triton.cdiv(D, d_split))
    s = x.new_empty(splits, T, R, dtype=torch.float32)
    logits = x.new_empty(splits, T, E, dtype=torch.float32)
    if T == 0 or R + E == 0:
        return s, logits
    most_e = 64 if x.dtype == torch.bfloat16 else 32
    sizes, most_tokens = rank_sizes(x, 128 if R else most_e)
    device = multiprocessors(x.device)
    tokens, ranks, (block_t, block_r) = shrink_shares(
        T, R or E, E if R else 0, splits, sizes, most_tokens, device
    )
    tile = choose("shrink", x, block_r, block_t)
    if R and tile["BLOCK_T"] > 32:
        most_e = 32  # next to ranks, 64 experts spill in some versions of Triton
    # the programs that the ranks need anyway share the experts
    block_e = padded(triton.cdiv(E, triton.cdiv(R or E, tile["BLOCK_R"])), most_e)
    columns = max(triton.cdiv(R or E, ranks), triton.cdiv(E, block_e))
    launch(
        x,
        _shrink_kernel,
        (triton.cdiv(T, tokens), columns, splits),
        *(x, x.stride(0)),
        *((None, 0) if a is None else (a, a.stride(0))),
        *((None, 0) if w is None else (w, w.stride(0))),
        *(s, logits, T, R, E, D, tokens, ranks, d_split),
        BLOCK_E=block_e,
        PRECISION=precision(x),
        **tile,
    )
    return s, logits
