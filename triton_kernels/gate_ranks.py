"""The middle of the forward, in rank space:  H = S * gate * scaling, zero for experts not picked.

For more ranks than fit into the registers of `rank_dense`: S comes from `shrink`, H goes to `expand`.
A program loops over the experts, a few at a time.  Reads 4*T*(R + 2K) bytes, writes T*R in x's dtype.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts, r one expert's.
"""

import triton
import triton.language as tl

from .gating import apply_gate, expert_rows, saved_rows, scatter_slots
from .launching import launch
from .numerics import round_to, rows_of
from .tiles import choose


@triton.jit(do_not_specialize=["T"])
def _gate_ranks_kernel(
    s_ptr,  # (T, R), or (T, r) shared by the experts
    indices_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    scaling_ptr,  # (E,)
    offsets_ptr,  # (E+1,), or None: every expert has `rank` rows
    rank,
    h_ptr,  # (T, R)
    T,
    E,
    R,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILE_E: tl.constexpr,
    TILE_R: tl.constexpr,
):
    t0 = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    t_ok = t < T

    for first in range(0, E, TILE_E):
        e = first + tl.arange(0, TILE_E)
        row, row_ok = expert_rows(offsets_ptr, rank, first, E, TILE_E, TILE_R)
        s_row, s_ok, width = saved_rows(offsets_ptr, rank, first, E, R, TILE_E, TILE_R, SHARED)
        s = rows_of(s_ptr, t0, width, s_row, BLOCK_T)
        s = tl.load(s, mask=t_ok[:, None] & s_ok[None, :], other=0.0)
        gate = scatter_slots(indices_ptr, weights_ptr, t, t_ok, e, e < E, K)
        gate *= tl.load(scaling_ptr + e, mask=e < E, other=0.0)[None, :]
        h = round_to(apply_gate(s, gate, TILE_E, TILE_R), h_ptr.dtype.element_ty)
        inside = t_ok[:, None] & row_ok[None, :]
        tl.store(rows_of(h_ptr, t0, R, row, BLOCK_T), h, mask=inside)


def gate_ranks(s, routing, experts, dtype):
    """H (T, R) in dtype."""
    T, R, E = len(s), len(experts.b), len(experts.scaling)
    h = s.new_empty(T, R, dtype=dtype)
    if T == 0:
        return h
    options = experts.options
    tile = choose("gate_ranks", s, options["TILE_E"] * options["TILE_R"])
    launch(
        s,
        _gate_ranks_kernel,
        (triton.cdiv(T, tile["BLOCK_T"]),),
        *(s, routing.indices, routing.weights),
        *(experts.scaling, experts.offsets, experts.rank, h, T, E, R),
        K=routing.indices.shape[1],
        **options,
        **tile,
    )
    return h
