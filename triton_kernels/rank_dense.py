"""The second half of the rank-dense plan, after `shrink`: router top-k, gate and expand, in one pass over y:

    [S | logits] = partial sums, added in order      H = gate(S, logits)      y = base + H @ B

Top-k and gating happen in registers, where H is the operand of the product.  Nothing is sorted, gathered or
read twice.  The second axis of the grid splits D_out until the programs fill the device: every program
of a tile of tokens repeats the decision, which costs less than waiting for another launch, and the
first one stores it.  If H does not fit next to a tile of y, it is stored instead, and `expand` is another
launch.
Reads 4*SPLITS*T*(R+E) + R*D_out + T*D_out (base), writes T*D_out + 4*T*(R + 2K + E).

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts, r one expert's.
"""

import torch
import triton
import triton.language as tl

from .expand import expand
from .gating import apply_gate, expert_rows, narrow, route, saved_rows, scatter_slots
from .grids import multiprocessors, output_shares
from .launching import launch, precision
from .numerics import convert, dot, in_first, load_total, round_to, rows_of, widen
from .router_topk import new_routing
from .shrink import shrink_splits
from .tiles import BLOCK_N, choose, token_sizes


@triton.jit(do_not_specialize=["T", "T_SPLIT"])
def _rank_dense_kernel(
    s_partial_ptr,  # (SPLITS, T, R or r)
    logits_partial_ptr,  # (SPLITS, T, E), or None: the routing is given
    SPLITS,
    biases,
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
    D_out,
    T_SPLIT,  # tokens per program, at most BLOCK_T
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
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t0 = tl.program_id(0).to(tl.int64) * T_SPLIT
    t = t0 + tl.arange(0, BLOCK_T)
    t_ok = (t < T) & (tl.arange(0, BLOCK_T) < T_SPLIT)
    e = tl.arange(0, BLOCK_E)
    row, row_ok = expert_rows(offsets_ptr, rank, 0, E, TILE_E, TILE_R)
    s_row, s_ok, width = saved_rows(offsets_ptr, rank, 0, E, R, TILE_E, TILE_R, SHARED)
    s_inside = t_ok[:, None] & s_ok[None, :]
    split = tl.program_id(1)  # a split of y; the first one stores what all of them compute

    s = load_total(s_partial_ptr, SPLITS, T, t0, width, s_row, s_inside, BLOCK_T)
    tl.store(rows_of(s_ptr, t0, width, s_row, BLOCK_T), s, mask=in_first(s_inside, split))

    if logits_partial_ptr is not None:
        inside = t_ok[:, None] & (e < E)[None, :]
        logits = load_total(logits_partial_ptr, SPLITS, T, t0, E, e, inside, BLOCK_T)
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


def rank_dense(x, w, biases, experts, base, routing, gate):
    """y (T, D_out), the router's decision (None if `routing` is given), S (T, R or r) in fp32."""
    b = experts.b
    T, E, (R, D_out) = len(x), len(experts.scaling), b.shape
    s_partial, logits_partial = shrink_splits(x, experts.a, w)
    tokens, columns, block_t = shares(x, base, experts, s_partial, logits_partial)
    tile = choose("rank_dense", x, experts.TILE_E * experts.TILE_R, block_t)
    tokens = tokens or tile["BLOCK_T"]
    if w is not None:
        routing = new_routing(x, E, gate["K"], tokens)
    s = x.new_empty(T, len(experts.a), dtype=torch.float32)
    y = x.new_empty(T, D_out) if columns else None
    h = None if columns else x.new_empty(T, R)
    launch(
        x,
        _rank_dense_kernel,
        (triton.cdiv(T, tokens), triton.cdiv(D_out, columns) if columns else 1),
        *(s_partial, None if w is None else logits_partial, len(s_partial), biases),
        *(b, b.stride(0), base, 0 if base is None else base.stride(0)),
        *(experts.scaling, experts.offsets, experts.rank, routing, s, h, y),
        *(T, E, R, D_out, tokens, columns or D_out),
        BLOCK_E=max(16, experts.TILE_E),
        PRECISION=precision(x),
        **experts.options,
        **gate,
        **tile,
    )
    if y is None:
        y = expand(h, b, None, None, base, x.dtype)
    return y, None if w is None else routing.results(), s


def shares(x, base, experts, *partials):
    """(tokens, columns of y) per program and BLOCK_T; None if `expand` writes y."""
    sizes, b = token_sizes(x, experts), experts.b
    if not sizes:
        return None, None, None
    again = sum(4 * len(v) * v.shape[2] for v in partials)
    once = 0 if base is None else b.shape[1] * base.itemsize
    per_tile, device = b.numel() * b.itemsize, multiprocessors(x.device)
    return output_shares(len(x), b.shape[1], sizes, BLOCK_N, again, per_tile, once, device)
