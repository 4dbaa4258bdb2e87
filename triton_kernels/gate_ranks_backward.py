"""The middle of the backward, in rank space, from G = dy B^T and S:

    dS = G g s      H = S g s      dw_tj = s_e * sum over rows r of e = ids_tj of G_tr S_tr

For more ranks than fit into the registers of `rank_gradient`; a program loops over the experts, a few at
a time. Reads 4*T*(2R + 3K) bytes, writes 2*T*R in x's dtype and 4*T*K bytes.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts, r one expert's.
"""

import torch
import triton
import triton.language as tl

from .gating import apply_gate_backward, expert_rows, gather_slots, saved_rows, scatter_slots
from .launching import launch
from .numerics import round_to, rows_of
from .tiles import choose


@triton.jit(do_not_specialize=["T"])
def _gate_ranks_backward_kernel(
    g_ptr,  # (T, R)
    s_ptr,  # (T, R), or (T, r) shared by the experts
    indices_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    scaling_ptr,  # (E,)
    offsets_ptr,  # (E+1,), or None: every expert has `rank` rows
    rank,
    ds_ptr,  # as s
    h_ptr,  # (T, R)
    dweights_ptr,  # (T, K), zeros
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
    shared_ds = tl.zeros((BLOCK_T, TILE_R), tl.float32)

    for first in range(0, E, TILE_E):
        e = first + tl.arange(0, TILE_E)
        row, row_ok = expert_rows(offsets_ptr, rank, first, E, TILE_E, TILE_R)
        s_row, s_ok, width = saved_rows(offsets_ptr, rank, first, E, R, TILE_E, TILE_R, SHARED)
        inside, s_inside = t_ok[:, None] & row_ok[None, :], t_ok[:, None] & s_ok[None, :]
        g = tl.load(rows_of(g_ptr, t0, R, row, BLOCK_T), mask=inside, other=0.0)
        s = tl.load(rows_of(s_ptr, t0, width, s_row, BLOCK_T), mask=s_inside, other=0.0)

        scaling = tl.load(scaling_ptr + e, mask=e < E, other=0.0)[None, :]
        gate = scaling * scatter_slots(indices_ptr, weights_ptr, t, t_ok, e, e < E, K)
        picked = scatter_slots(indices_ptr, None, t, t_ok, e, e < E, K)
        ds, h, dgate = apply_gate_backward(g, s, gate, picked, TILE_E, TILE_R, SHARED)

        h = round_to(h, h_ptr.dtype.element_ty)
        tl.store(rows_of(h_ptr, t0, R, row, BLOCK_T), h, mask=inside)
        gather_slots(dgate * scaling, dweights_ptr, indices_ptr, t, t_ok, e, e < E, K)
        if SHARED:
            shared_ds += ds
        else:
            ds = round_to(ds, ds_ptr.dtype.element_ty)
            tl.store(rows_of(ds_ptr, t0, width, s_row, BLOCK_T), ds, mask=s_inside)

    if SHARED:
        j = tl.arange(0, TILE_R)
        ds = round_to(shared_ds, ds_ptr.dtype.element_ty)
        inside = t_ok[:, None] & (j < rank)[None, :]
        tl.store(rows_of(ds_ptr, t0, rank, j, BLOCK_T), ds, mask=inside)


def gate_ranks_backward(g, s, routing, experts, dtype):
    """dS (T, R or r) and H (T, R) in dtype, dweights (T, K)."""
    (T, R), E = g.shape, len(experts.scaling)
    ds, h = g.new_empty(s.shape, dtype=dtype), g.new_empty(T, R, dtype=dtype)
    dweights = torch.zeros_like(routing.weights)  # empty slots stay zero
    if T == 0:
        return ds, h, dweights
    options = experts.options
    tile = choose("gate_ranks", g, options["TILE_E"] * options["TILE_R"])
    launch(
        g,
        _gate_ranks_backward_kernel,
        (triton.cdiv(T, tile["BLOCK_T"]),),
        *(g, s, routing.indices, routing.weights),
        *(experts.scaling, experts.offsets, experts.rank, ds, h, dweights, T, E, R),
        K=routing.indices.shape[1],
        **options,
        **tile,
    )
    return ds, h, dweights
