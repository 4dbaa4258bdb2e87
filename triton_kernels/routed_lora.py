"""Router top-k, shrink, gate and expand, in one pass over x and one over y:

    [S | logits] = x @ [A | W]^T      H = gate(S, logits)      y = base + H @ B

Phase 1 loops over D_in and forms S and the logits from the same tile of x; top-k and gating happen in
registers, where H then is the operand of phase 2, which loops over D_out.  Nothing is sorted, gathered
or read twice.  Where H does not fit beside a tile of y it is stored instead, and `expand` is a second
launch; where T is too small to fill a device, `shrink` comes first, split along D_in.
Reads T*D_in + (R+E)*D_in + R*D_out + T*D_out (base), writes T*D_out + 4*T*(R + 2K + E).

Letters: T tokens, E experts, K picked experts a token, R rank rows of all experts, r one expert's.
"""

import torch
import triton
import triton.language as tl

from .expand import expand
from .gate_ranks import gate_ranks
from .gating import apply_gate, expert_rows, narrow, route, saved_rows, scatter_slots
from .launching import (
    bundle_experts,
    column_rows,
    launch,
    precision,
    require_rank_dense,
    require_supported,
)
from .numerics import add_parts, dot, project, round_to, rows_of, widen
from .router_topk import Routing, gate_options, new_routing, route_logits
from .shrink import shrink, shrink_parts
from .tiles import choose


@triton.jit(do_not_specialize=["T"])
def _routed_lora_kernel(
    x_ptr,  # (T, D_in), or None: `shrink` left its sums in parts
    stride_xt,
    s_parts_ptr,  # (PARTS, T, R or r)
    logits_parts_ptr,  # (PARTS, T, E)
    PARTS,
    w_ptr,  # (E, D_in), or None: the routing is given
    stride_we,
    bias_ptr,  # (E,) or None
    a_ptr,  # (R, D_in), or (r, D_in) shared by the experts
    stride_ar,
    b_ptr,  # (R, D_out)
    stride_br,
    base_ptr,  # (T, D_out) or None
    stride_baset,
    scaling_ptr,  # (E,)
    offsets_ptr,  # (E+1,), or None: every expert has `rank` rows
    rank,
    routing,  # indices (T, K), weights (T, K), …
    s_ptr,  # (T, R or r)
    h_ptr,  # (T, R), or None: y is written
    y_ptr,  # (T, D_out), or None
    T,
    E,
    R,
    D_in,
    D_out,
    top_p,
    threshold,
    K: tl.constexpr,
    GATE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SHARED: tl.constexpr,
    EP: tl.constexpr,
    RP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t0 = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    t_ok = t < T
    e = tl.arange(0, BLOCK_E)
    row, row_ok = expert_rows(offsets_ptr, rank, 0, E, EP, RP)
    s_row, s_ok, width = saved_rows(offsets_ptr, rank, 0, E, R, EP, RP, SHARED)
    s_inside = t_ok[:, None] & s_ok[None, :]

    if x_ptr is None:
        s = add_parts(s_parts_ptr, PARTS, T, t0, width, s_row, s_inside, BLOCK_T)
        logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        if w_ptr is not None:
            inside = t_ok[:, None] & (e < E)[None, :]
            logits = add_parts(logits_parts_ptr, PARTS, T, t0, E, e, inside, BLOCK_T)
    else:
        s, logits = project(
            x_ptr, stride_xt, t, t_ok, a_ptr, stride_ar, s_row, s_ok, w_ptr, stride_we, e, e < E,
            0, D_in, BLOCK_D, PRECISION,
        )  # fmt: skip
    tl.store(rows_of(s_ptr, t0, width, s_row, BLOCK_T), s, mask=s_inside)

    if w_ptr is not None:
        gate = route(
            logits, bias_ptr, top_p, threshold, routing, t0, t, t_ok, e, e < E, T, E,
            K, GATE, RENORMALIZE,
        )  # fmt: skip
    else:
        gate = scatter_slots(routing.indices, routing.weights, t, t_ok, e, e < E, K)
    gate *= tl.load(scaling_ptr + e, mask=e < E, other=0.0)[None, :]
    h = apply_gate(tl.where(s_ok[None, :], s, 0.0), narrow(gate, EP), EP, RP)
    h = round_to(h, b_ptr.dtype.element_ty)

    if h_ptr is not None:
        inside = t_ok[:, None] & row_ok[None, :]
        tl.store(rows_of(h_ptr, t0, R, row, BLOCK_T), h, mask=inside)
    else:
        for n0 in range(0, D_out, BLOCK_N):
            n = (n0 + tl.arange(0, BLOCK_N))[None, :]
            b = b_ptr + row[:, None].to(tl.int64) * stride_br + n
            b = tl.load(b, mask=row_ok[:, None] & (n < D_out), other=0.0)
            y = dot(h, b, tl.zeros((BLOCK_T, BLOCK_N), tl.float32), PRECISION)
            inside = t_ok[:, None] & (n < D_out)
            if base_ptr is not None:
                base = tl.load(base_ptr + t[:, None] * stride_baset + n, mask=inside, other=0.0)
                y += widen(base)
            y = round_to(y, y_ptr.dtype.element_ty)
            tl.store(y_ptr + t[:, None] * D_out + n, y, mask=inside)


def routed_lora(
    x, w, a, b, base, bias, scaling, offsets, shared_a, top_k, gate, renormalize, top_p, threshold, plan
):  # fmt: skip
    """y (T, D_out), indices, weights, logits, mean_prob, lse, counts, S."""
    require_rank_dense(plan)
    require_supported(x, w, a, b)
    experts = bundle_experts(a, b, scaling, offsets, shared_a)
    gate = gate_options(top_k, gate, renormalize, top_p, threshold)
    a, b = a.to(x.dtype), b.to(x.dtype)
    if len(x) == 0 or not experts.fit_registers:
        s, logits = shrink(x, a, w)
        routing = route_logits(logits, bias, gate)
        return _expand_gated(s, Routing(*routing[:2]), experts, base, x.dtype), *routing, s
    tile = choose("routed_lora", x, experts.EP * experts.RP)
    routing = new_routing(x, len(w), top_k, tile["BLOCK_T"])
    bias = None if bias is None else bias.float()
    y, s = _launch(x, column_rows(w), bias, experts, base, routing, gate, tile)
    return y, *routing.results(), s


def grouped_lora(x, a, b, base, indices, weights, scaling, offsets, shared_a, plan):
    """y (T, D_out), S."""
    require_rank_dense(plan)
    require_supported(x, a, b)
    experts = bundle_experts(a.to(x.dtype), b.to(x.dtype), scaling, offsets, shared_a)
    routing = Routing(indices.contiguous(), weights.contiguous())
    if len(x) == 0 or not experts.fit_registers:
        s, _ = shrink(x, a, None)
        return _expand_gated(s, routing, experts, base, x.dtype), s
    tile = choose("routed_lora", x, experts.EP * experts.RP)
    gate = gate_options(indices.shape[1])
    return _launch(x, None, None, experts, base, routing, gate, tile)


def _expand_gated(s, routing, experts, base, dtype):
    h = gate_ranks(s, routing, experts, dtype)
    return expand(h, experts.b, None, None, base, dtype)


def _launch(x, w, bias, experts, base, routing, gate, tile):
    x, base = column_rows(x), None if base is None else column_rows(base)
    a, b = experts.a, experts.b
    T, E, R = len(x), len(experts.scaling), len(b)
    s = x.new_empty(T, len(a), dtype=torch.float32)
    one_launch = tile.pop("ONE_LAUNCH")
    y = x.new_empty(T, b.shape[1]) if one_launch else None
    h = None if one_launch else x.new_empty(T, R)
    source = (x, x.stride(0), None, None, 0)
    if tile.pop("IN_PARTS"):
        parts = shrink_parts(x, a, w)
        source = (None, 0, *parts, len(parts[0]))
    launch(
        x,
        _routed_lora_kernel,
        (triton.cdiv(T, tile["BLOCK_T"]),),
        *(*source, w, 0 if w is None else w.stride(0), bias),
        *(a, a.stride(0), b, b.stride(0), base, 0 if base is None else base.stride(0)),
        *(experts.scaling, experts.offsets, experts.rank, routing, s, h, y),
        *(T, E, R, x.shape[1], b.shape[1]),
        BLOCK_E=max(16, experts.EP),
        PRECISION=precision(x),
        **experts.options,
        **gate,
        **tile,
    )
    return y if one_launch else expand(h, b, None, None, base, x.dtype), s
