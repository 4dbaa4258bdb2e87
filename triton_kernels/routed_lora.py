"""Router top-k, shrink, gate and expand, in one pass over x and one over y:

    [S | logits] = x @ [A | W]^T      H = gate(S, logits)      y = base + H @ B

Phase 1 loops over D_in and computes S and the logits from the same tile of x; top-k and gating happen in
registers, where H is the operand of phase 2, which loops over D_out.  Nothing is sorted, gathered
or read twice.  If H does not fit next to a tile of y, it is stored instead and `expand` is a second
launch.  If T is too small to fill a device, `shrink` runs first, split along D_in, and phase 2 is split
along D_out.  This file also dispatches to the other plans: `decode`, `segmented`.
Reads T*D_in + (R+E)*D_in + R*D_out + T*D_out (base), writes T*D_out + 4*T*(R + 2K + E).

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts, r one expert's.
"""

import torch
import triton
import triton.language as tl

from .decode import decode
from .expand import expand
from .experts import bundle_experts
from .gate_ranks import gate_ranks
from .gating import apply_gate, expert_rows, narrow, route, saved_rows, scatter_slots
from .launching import column_rows, launch, precision, require_supported
from .numerics import add_parts, convert, dot, in_first, project, round_to, rows_of, widen
from .router_topk import (
    NO_BIASES,
    Routing,
    biases_of,
    decide,
    gate_options,
    new_routing,
    router_topk,
)
from .segmented_expand import segmented_expand
from .segmented_shrink import segmented_shrink, segments_of
from .shrink import shrink, shrink_parts
from .slots import grouped_lora_of_slots
from .tiles import choose


@triton.jit(do_not_specialize=["T"])
def _routed_lora_kernel(
    x_ptr,  # (T, D_in), or None: `shrink` wrote its sums in parts
    stride_xt,
    s_parts_ptr,  # (PARTS, T, R or r)
    logits_parts_ptr,  # (PARTS, T, E)
    PARTS,
    w_ptr,  # (E, D_in), or None: the routing is given
    stride_we,
    biases,
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
    STRETCH,  # columns of y that a program writes
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
    part = tl.program_id(1)  # a split of y; the first one stores what all of them compute

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
    tl.store(rows_of(s_ptr, t0, width, s_row, BLOCK_T), s, mask=in_first(s_inside, part))

    if w_ptr is not None:
        gate = route(
            logits, biases, top_p, threshold, routing, part, t0, t, t_ok, e, e < E, T, E, 0,
            K, GATE, RENORMALIZE,
        )  # fmt: skip
    else:
        gate = scatter_slots(routing.indices, routing.weights, t, t_ok, e, e < E, K)
    gate *= tl.load(scaling_ptr + e, mask=e < E, other=0.0)[None, :]
    h = apply_gate(tl.where(s_ok[None, :], s, 0.0), narrow(gate, EP), EP, RP)
    if h_ptr is not None:
        h = round_to(h, h_ptr.dtype.element_ty)
        inside = t_ok[:, None] & row_ok[None, :]
        tl.store(rows_of(h_ptr, t0, R, row, BLOCK_T), h, mask=inside)
    else:
        h = round_to(h, y_ptr.dtype.element_ty)
        first = part * STRETCH
        for n0 in range(first, tl.minimum(first + STRETCH, D_out), BLOCK_N):
            n = (n0 + tl.arange(0, BLOCK_N))[None, :]
            b = b_ptr + row[:, None].to(tl.int64) * stride_br + n
            b = convert(tl.load(b, mask=row_ok[:, None] & (n < D_out), other=0.0), h.dtype)
            y = dot(h, b, tl.zeros((BLOCK_T, BLOCK_N), tl.float32), PRECISION)
            in_y = t_ok[:, None] & (n < D_out)
            if base_ptr is not None:
                base = tl.load(base_ptr + t[:, None] * stride_baset + n, mask=in_y, other=0.0)
                y += widen(base)
            y = round_to(y, y_ptr.dtype.element_ty)
            tl.store(y_ptr + t[:, None] * D_out + n, y, mask=in_y)


def routed_lora(
    x, w, a, b, base, bias, router_bias, scaling, offsets, shared_a, top_k, gate, renormalize,
    top_p, threshold, plan,
):  # fmt: skip
    """y (T, D_out), indices, weights, logits, mean_prob, lse, counts, S."""
    require_supported(x, w, a, b)
    x, base = column_rows(x), None if base is None else column_rows(base)
    experts = bundle_experts(a, b, scaling, offsets, shared_a)
    router = top_k, gate, renormalize, top_p, threshold
    if plan == "segmented":
        routing = router_topk(x, w, bias, router_bias, *router)
        y, s = _segmented(x, base, Routing(*routing[:2]), experts)
        return y, *routing, s
    biases = biases_of(bias, router_bias)
    if plan == "decode":
        y, routing, s = decode(x, w, biases, base, experts, None, gate_options(*router))
        return y, *routing, s
    return _rank_dense(x, w, biases, base, experts, gate_options(*router))


def grouped_lora(x, a, b, base, indices, weights, scaling, offsets, shared_a, slots, plan):
    """y (T, D_out), or (T*K, D_out) by slot; S."""
    require_supported(x, a, b)
    x, base = column_rows(x), None if base is None else column_rows(base)
    experts = bundle_experts(a, b, scaling, offsets, shared_a)
    routing = Routing(indices.contiguous(), weights.contiguous())
    if slots != "none":
        return grouped_lora_of_slots(x, base, routing, experts, slots)
    if plan == "segmented":
        return _segmented(x, base, routing, experts)
    if plan == "decode":
        gate = gate_options(indices.shape[1])
        y, _, s = decode(x, None, NO_BIASES, base, experts, routing, gate)
        return y, s
    if len(x) == 0 or not experts.fit_registers:
        s, _ = shrink(x, a, None)
        return _expand_gated(s, routing, experts, base, x.dtype), s
    tile = _tile(x, experts)
    gate = gate_options(indices.shape[1])
    return _launch(x, None, NO_BIASES, experts, base, routing, gate, tile)


def _rank_dense(x, w, biases, base, experts, gate):
    if len(x) == 0 or not experts.fit_registers:
        s, logits = shrink(x, experts.a, w)
        routing = decide(logits, biases, gate)
        return _expand_gated(s, Routing(*routing[:2]), experts, base, x.dtype), *routing, s
    tile = _tile(x, experts)
    routing = new_routing(x, len(w), gate["K"], tile["BLOCK_T"])
    y, s = _launch(x, column_rows(w), biases, experts, base, routing, gate, tile)
    return y, *routing.results(), s


def _segmented(x, base, routing, experts):
    s = shrink(x, experts.a, None)[0] if experts.shared_a else None
    if len(x) == 0:
        columns = experts.largest * (1 if experts.shared_a else routing.indices.shape[1])
        return x.new_empty(0, experts.b.shape[1]), x.new_empty(0, columns, dtype=torch.float32)
    segments = segments_of(x, routing.indices, experts)
    s, h = segmented_shrink(x, experts.a, s, routing, experts, segments)
    y = segmented_expand(h, experts.b, None, None, base, segments, experts, x.dtype)
    return y, s.view(len(x), -1)


def _tile(x, experts):
    kernel = "routed_lora"
    if experts.shared_a:
        kernel = "routed_lora_shared"
    elif experts.EP > 16:
        kernel = "routed_lora_many_experts"
    return choose(kernel, x, experts.EP * experts.RP)


def _expand_gated(s, routing, experts, base, dtype):
    h = gate_ranks(s, routing, experts, dtype)
    return expand(h, experts.b, None, None, base, dtype)


def _launch(x, w, biases, experts, base, routing, gate, tile):
    a, b = experts.a, experts.b
    T, E, (R, D_out) = len(x), len(experts.scaling), b.shape
    s = x.new_empty(T, len(a), dtype=torch.float32)
    stretch = tile.pop("STRETCH")
    y = None if stretch is None else x.new_empty(T, D_out)
    h = x.new_empty(T, R) if stretch is None else None
    stretches = 1 if stretch is None else max(1, triton.cdiv(D_out, stretch))
    source = (x, x.stride(0), None, None, 0)
    if tile.pop("IN_PARTS"):
        parts = shrink_parts(x, a, w)
        source = (None, 0, *parts, len(parts[0]))
    launch(
        x,
        _routed_lora_kernel,
        (triton.cdiv(T, tile["BLOCK_T"]), stretches),
        *(*source, w, 0 if w is None else w.stride(0), biases),
        *(a, a.stride(0), b, b.stride(0), base, 0 if base is None else base.stride(0)),
        *(experts.scaling, experts.offsets, experts.rank, routing, s, h, y),
        *(T, E, R, x.shape[1], D_out, stretch or D_out),
        BLOCK_E=max(16, experts.EP),
        PRECISION=precision(x),
        **experts.options,
        **gate,
        **tile,
    )
    return expand(h, b, None, None, base, x.dtype) if y is None else y, s
