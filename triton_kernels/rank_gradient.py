"""Backward to rank space, after `shrink`, which computes  G = dy @ B^T  in one pass over dy:

    dS = G g s      dg_te = s_e * sum over rows r of e of G_tr S_tr      dlogits = router backward of dg

With G and the saved S (T, R), the gate's gradient needs nothing of size D_out.  H is recomputed rather than
saved: dB = H^T dy.  G comes as partial sums over splits of D_out, which let few programs share B and yet
fill a device.  If the ranks do not fit into registers, `gate_ranks_backward` takes a few at a time.
Reads 4*T*((SPLITS + 1)*R + 3K + E), writes T*(R + R) + 4*T*E.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts, r one expert's.
"""

import torch
import triton
import triton.language as tl

from .gate_ranks_backward import gate_ranks_backward
from .gating import (
    apply_gate_backward,
    expert_rows,
    gather_slots,
    router_gradient,
    saved_rows,
    scatter_slots,
    share_of_slots,
)
from .launching import launch
from .numerics import load_total, round_to, rows_of
from .router_topk_backward import aux_gradients, logits_gradient
from .shrink import shrink, shrink_splits
from .tiles import choose


@triton.jit(do_not_specialize=["T"])
def _rank_gradient_kernel(
    g_partial_ptr,  # (SPLITS, T, R)
    SPLITS,
    s_ptr,  # (T, R), or (T, r) shared by the experts
    indices_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    scaling_ptr,  # (E,)
    offsets_ptr,  # (E+1,), or None: every expert has `rank` rows
    rank,
    logits_ptr,  # (T, E), or None: the routing was given
    aux,
    ds_ptr,  # as s
    h_ptr,  # (T, R)
    dweights_ptr,  # (T, K), zeros, or None
    dlogits_ptr,  # (T, E)
    T,
    E,
    R,
    K: tl.constexpr,
    GATE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SHARED: tl.constexpr,
    TILE_E: tl.constexpr,
    TILE_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    t0 = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    e = tl.arange(0, TILE_E)
    t_ok, e_ok = t < T, e < E
    row, row_ok = expert_rows(offsets_ptr, rank, 0, E, TILE_E, TILE_R)
    s_row, s_ok, width = saved_rows(offsets_ptr, rank, 0, E, R, TILE_E, TILE_R, SHARED)
    inside, s_inside = t_ok[:, None] & row_ok[None, :], t_ok[:, None] & s_ok[None, :]

    g = load_total(g_partial_ptr, SPLITS, T, t0, R, row, inside, BLOCK_T)
    g = tl.where(row_ok[None, :], g, 0.0)
    s = tl.load(rows_of(s_ptr, t0, width, s_row, BLOCK_T), mask=s_inside, other=0.0)

    scaling = tl.load(scaling_ptr + e, mask=e_ok, other=0.0)[None, :]
    gate = scatter_slots(indices_ptr, weights_ptr, t, t_ok, e, e_ok, K)
    picked = scatter_slots(indices_ptr, None, t, t_ok, e, e_ok, K)
    ds, h, dgate = apply_gate_backward(g, s, gate * scaling, picked, TILE_E, TILE_R, SHARED)
    dgate *= scaling

    ds, h = round_to(ds, ds_ptr.dtype.element_ty), round_to(h, h_ptr.dtype.element_ty)
    tl.store(rows_of(ds_ptr, t0, width, s_row, BLOCK_T), ds, mask=s_inside)
    tl.store(rows_of(h_ptr, t0, R, row, BLOCK_T), h, mask=inside)

    if dweights_ptr is not None:
        gather_slots(dgate, dweights_ptr, indices_ptr, t, t_ok, e, e_ok, K)
    if logits_ptr is not None:
        e_inside = t_ok[:, None] & e_ok[None, :]
        logits = tl.load(rows_of(logits_ptr, t0, E, e, BLOCK_T), mask=e_inside, other=0.0)
        share = tl.sum(dgate * gate, 1)
        dgate *= picked
        if aux.dweights is not None:
            dgate += scatter_slots(indices_ptr, aux.dweights, t, t_ok, e, e_ok, K)
            share += share_of_slots(weights_ptr, aux.dweights, t, t_ok, K)
        dlogits = router_gradient(
            logits, dgate, picked, share, aux, t0, t, t_ok, e, e_ok, T, E, GATE, RENORMALIZE
        )
        tl.store(rows_of(dlogits_ptr, t0, E, e, BLOCK_T), dlogits, mask=e_inside)


def rank_gradient(dy, s, routing, experts, router):
    """dS (T, R or r) and H (T, R) in dy's dtype; dweights (T, K), or dlogits (T, E) with a router.

    `router` holds its gate, whether it renormalizes, and the gradients that reach the routing from outside.
    """
    if len(dy) == 0 or not experts.fit_registers:
        return _in_memory(dy, s, routing, experts, router)
    b = experts.b
    indices, weights, logits, *_ = routing
    gate, renormalize, aux = router or ("softmax", False, aux_gradients())
    ds, h = dy.new_empty(s.shape), dy.new_empty(len(dy), len(b))
    dweights = torch.zeros_like(weights) if router is None else None
    dlogits = None if router is None else torch.empty_like(logits)
    g, _ = shrink_splits(dy, b, None)
    tile = choose("rank_gradient", dy, experts.TILE_E * experts.TILE_R)
    launch(
        dy,
        _rank_gradient_kernel,
        (triton.cdiv(len(dy), tile["BLOCK_T"]),),
        *(g, len(g), s, indices, weights),
        *(experts.scaling, experts.offsets, experts.rank, logits, aux),
        *(ds, h, dweights, dlogits),
        *(len(dy), len(experts.scaling), len(b)),
        K=indices.shape[1],
        GATE=gate,
        RENORMALIZE=renormalize,
        **experts.options,
        **tile,
    )
    return ds, h, dweights, dlogits


def _in_memory(dy, s, routing, experts, router):
    g, _ = shrink(dy, experts.b, None)
    ds, h, dweights = gate_ranks_backward(g, s, routing, experts, dy.dtype)
    if router is None:
        return ds, h, dweights, None
    return ds, h, dweights, logits_gradient(dweights, routing, router)
