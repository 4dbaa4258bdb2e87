"""The rank-dense plan: router top-k, shrink, gate and expand, in one pass over x and one over y:

    [S | logits] = x @ [A | W]^T      H = gate(S, logits)      y = base + H @ B

Phase 1 loops over D_in and computes S and the logits from the same tile of x; top-k and gating happen in
registers, where H is the operand of phase 2, which loops over D_out.  Nothing is sorted, gathered
or read twice.  If H does not fit next to a tile of y, it is stored instead and `expand` is a second
launch.  If T is too small to fill a device, `shrink` runs first, split along D_in, and phase 2 is split
along D_out.
Reads T*D_in + (R+E)*D_in + R*D_out + T*D_out (base), writes T*D_out + 4*T*(R + 2K + E).

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts, r one expert's.
"""

import torch
import triton
import triton.language as tl

from .expand import expand
from .gating import apply_gate, expert_rows, narrow, route, saved_rows, scatter_slots
from .launching import launch, precision
from .numerics import convert, dot, in_first, load_total, project, round_to, rows_of, widen
from .shrink import shrink_splits
from .tiles import choose


@triton.jit(do_not_specialize=["T"])
def _rank_dense_kernel(
    x_ptr,  # (T, D_in), or None: `shrink` wrote partial sums
    stride_xt,
    s_partial_ptr,  # (SPLITS, T, R or r)
    logits_partial_ptr,  # (SPLITS, T, E)
    SPLITS,
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
    D_OUT_SPLIT,  # columns of y per program
    top_p,
    threshold,
    K: tl.constexpr,
    GATE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SHARED: tl.constexpr,
    TILE_E: tl.constexpr,
    TILE_R: tl.constexpr,
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
    row, row_ok = expert_rows(offsets_ptr, rank, 0, E, TILE_E, TILE_R)
    s_row, s_ok, width = saved_rows(offsets_ptr, rank, 0, E, R, TILE_E, TILE_R, SHARED)
    s_inside = t_ok[:, None] & s_ok[None, :]
    split = tl.program_id(1)  # a split of y; the first one stores what all of them compute

    if x_ptr is None:
        s = load_total(s_partial_ptr, SPLITS, T, t0, width, s_row, s_inside, BLOCK_T)
        logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        if w_ptr is not None:
            inside = t_ok[:, None] & (e < E)[None, :]
            logits = load_total(logits_partial_ptr, SPLITS, T, t0, E, e, inside, BLOCK_T)
    else:
        s, logits = project(
            x_ptr, stride_xt, t, t_ok, a_ptr, stride_ar, s_row, s_ok, w_ptr, stride_we, e, e < E,
            0, D_in, BLOCK_D, PRECISION,
        )  # fmt: skip
    tl.store(rows_of(s_ptr, t0, width, s_row, BLOCK_T), s, mask=in_first(s_inside, split))

    if w_ptr is not None:
        gate = route(
            logits, biases, top_p, threshold, routing, split, t0, t, t_ok, e, e < E, T, E, 0,
            K, GATE, RENORMALIZE,
        )  # fmt: skip
    else:
        gate = scatter_slots(routing.indices, routing.weights, t, t_ok, e, e < E, K)
    gate *= tl.load(scaling_ptr + e, mask=e < E, other=0.0)[None, :]
    h = apply_gate(tl.where(s_ok[None, :], s, 0.0), narrow(gate, TILE_E), TILE_E, TILE_R)
    if h_ptr is not None:
        h = round_to(h, h_ptr.dtype.element_ty)
        inside = t_ok[:, None] & row_ok[None, :]
        tl.store(rows_of(h_ptr, t0, R, row, BLOCK_T), h, mask=inside)
    else:
        h = round_to(h, y_ptr.dtype.element_ty)
        first = split * D_OUT_SPLIT
        for n0 in range(first, tl.minimum(first + D_OUT_SPLIT, D_out), BLOCK_N):
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


def tile_of(x, experts):
    kernel = "rank_dense"
    if experts.shared_a:
        kernel = "rank_dense_shared"
    elif experts.TILE_E > 16:
        kernel = "rank_dense_many_experts"
    return choose(kernel, x, experts.TILE_E * experts.TILE_R)


def rank_dense(x, w, biases, experts, base, routing, gate, tile):
    """y (T, D_out) and S (T, R or r) in fp32.  Also fills `routing`, unless w is None: it is given then."""
    a, b = experts.a, experts.b
    T, E, (R, D_out) = len(x), len(experts.scaling), b.shape
    s = x.new_empty(T, len(a), dtype=torch.float32)
    d_out_split = tile.pop("D_OUT_SPLIT")
    y = None if d_out_split is None else x.new_empty(T, D_out)
    h = x.new_empty(T, R) if d_out_split is None else None
    splits = 1 if d_out_split is None else max(1, triton.cdiv(D_out, d_out_split))
    source = (x, x.stride(0), None, None, 0)
    if tile.pop("SHRINK_FIRST"):
        sums = shrink_splits(x, a, w)
        source = (None, 0, *sums, len(sums[0]))
    launch(
        x,
        _rank_dense_kernel,
        (triton.cdiv(T, tile["BLOCK_T"]), splits),
        *(*source, w, 0 if w is None else w.stride(0), biases),
        *(a, a.stride(0), b, b.stride(0), base, 0 if base is None else base.stride(0)),
        *(experts.scaling, experts.offsets, experts.rank, routing, s, h, y),
        *(T, E, R, x.shape[1], D_out, d_out_split or D_out),
        BLOCK_E=max(16, experts.TILE_E),
        PRECISION=precision(x),
        **experts.options,
        **gate,
        **tile,
    )
    return expand(h, b, None, None, base, x.dtype) if y is None else y, s
