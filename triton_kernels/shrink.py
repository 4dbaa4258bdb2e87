"""Shrink:  [S | logits] = x @ [A | W]^T, in fp32.

A skinny product: x is the only large operand, so one pass over it computes both products.  The ranks are
tiled over the second axis of the grid; if they fit into one tile, x is read once.  Few tokens cannot
fill a device, so the third axis splits D, and the consumer adds the partial sums in order.  B has the
layout of A, so G = dy B^T is a shrink too.  Reads T*D + (R+E)*D, writes 4*PARTS*T*(R+E) bytes.

Letters: T tokens, E experts, R rank rows of all experts, D columns of x.
"""

import torch
import triton
import triton.language as tl

from .add_parts import add_parts
from .launching import column_rows, launch, padded, precision, require_supported
from .numerics import project, rows_of
from .tiles import FEW, choose


@triton.jit(do_not_specialize=["T"])
def _shrink_kernel(
    x_ptr,  # (T, D)
    stride_xt,
    a_ptr,  # (R, D) or None
    stride_ar,
    w_ptr,  # (E, D) or None
    stride_we,
    s_ptr,  # (PARTS, T, R)
    logits_ptr,  # (PARTS, T, E)
    T,
    R,
    E,
    D,
    STRETCH,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t0 = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    t_ok = t < T
    part = tl.program_id(2)

    s, logits = project(
        x_ptr, stride_xt, t, t_ok, a_ptr, stride_ar, row, row < R, w_ptr, stride_we, e, e < E,
        part * STRETCH, tl.minimum((part + 1) * STRETCH, D), BLOCK_D, PRECISION,
    )  # fmt: skip

    t0 += part.to(tl.int64) * T
    if a_ptr is not None:
        inside = t_ok[:, None] & (row < R)[None, :]
        tl.store(rows_of(s_ptr, t0, R, row, BLOCK_T), s, mask=inside)
    if w_ptr is not None:
        inside = t_ok[:, None] & (e < E)[None, :]
        tl.store(rows_of(logits_ptr, t0, E, e, BLOCK_T), logits, mask=inside)


def shrink(x, a, w):
    """S (T, R) and logits (T, E); either matrix may be None, and its result then has no columns."""
    return sum_of_parts(*shrink_parts(x, a, w))


def sum_of_parts(*parts):
    if len(parts[0]) == 1:
        return tuple(v[0] for v in parts)
    out = tuple(v.new_empty(v.shape[1:]) for v in parts)
    add_parts(*zip(parts, out), by_token=True)
    return out


def shrink_parts(x, a, w):
    """The same with one partial sum per split of D: (PARTS, T, R), (PARTS, T, E)."""
    require_supported(x, *(v for v in (a, w) if v is not None))
    x = column_rows(x)
    a, w = (None if v is None else column_rows(v) for v in (a, w))
    (T, D), R, E = x.shape, 0 if a is None else len(a), 0 if w is None else len(w)
    tile = choose("shrink", x, max(R, E))
    stretch = tile.pop("STRETCH", D) or 1
    parts = max(1, triton.cdiv(D, stretch))
    s = x.new_empty(parts, T, R, dtype=torch.float32)
    logits = x.new_empty(parts, T, E, dtype=torch.float32)
    if T == 0:
        return s, logits
    # with ranks and many tokens, 64 experts spill in some versions of Triton; with few tokens, 32 in others
    wide = x.dtype == torch.bfloat16 and (R == 0 or T <= FEW)
    block_r = padded(R, 128)
    # the programs that the ranks need anyway share the experts
    share = triton.cdiv(E, max(1, triton.cdiv(R, block_r)))
    block_e = padded(share, 64 if wide else 32)
    columns = max(triton.cdiv(R, block_r), triton.cdiv(E, block_e))
    launch(
        x,
        _shrink_kernel,
        (triton.cdiv(T, tile["BLOCK_T"]), columns, parts),
        *(x, x.stride(0)),
        *((None, 0) if a is None else (a, a.stride(0))),
        *((None, 0) if w is None else (w, w.stride(0))),
        *(s, logits, T, R, E, D, stretch),
        BLOCK_R=block_r,
        BLOCK_E=block_e,
        PRECISION=precision(x),
        **tile,
    )
    return s, logits
