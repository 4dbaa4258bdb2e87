"""The decode plan, for a handful of tokens: two launches, both split until they fill a device.

    partial sums of [S | logits] = x @ [A | W]^T over splits of D_in           (shrink)
    y = base + gate(S, logits) @ B, one tile of columns per program     (here)

Several layers that read the same x are banks: their A, W and B are contiguous in memory, bank after bank, and
the same two launches run all of them.

Every program adds the partial sums in order and repeats the routing decision, which costs far less than
waiting for another launch; the first program stores it.  Blocks of experts that no token picked are
skipped, including B.
Reads 4*SPLITS*T*(R+E) bytes per program and the picked rows of B, writes T*D_out.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts, r one expert's.
"""

import torch
import triton
import triton.language as tl

from .gating import route, scatter_slots
from .launching import launch, precision
from .numerics import convert, dot, in_first, load_total, round_to, rows_of, widen
from .router_topk import MAX_EXPERTS, RoutingBuffers, decide, new_routing
from .shrink import shrink_splits, totals
from .tiles import choose


@triton.jit(do_not_specialize=["T"])
def _decode_kernel(
    s_partial_ptr,  # (SPLITS, T, BANKS, R or r)
    logits_partial_ptr,  # (SPLITS, T, BANKS, E), or None: the routing is given
    SPLITS,
    columns,  # (first column of y, one past the last, first column of b) of each bank
    TILES,  # programs per bank
    biases,  # (BANKS, E)
    b_ptr,  # (R, columns of all banks)
    stride_br,
    base_ptr,  # (T, D_out) or None
    stride_baset,
    scaling_ptr,  # (BANKS, E)
    offsets_ptr,  # (E+1,), or None: every expert has `rank` rows
    rank,
    routing,  # indices (T, K), weights (T, K), …; None with several banks
    s_ptr,  # (T, R or r), or None
    y_ptr,  # (T, D_out)
    T,
    E,
    R,
    D_out,
    top_p,
    threshold,
    K: tl.constexpr,
    GATE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SHARED: tl.constexpr,
    BANKS: tl.constexpr,
    TILE_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    t0 = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    t_ok = t < T
    split = tl.program_id(1)
    bank, begin, end, shift = 0, 0, D_out, 0
    if BANKS > 1:
        bank, split = split // TILES, split % TILES
        for j in tl.static_range(BANKS):
            begin = tl.where(bank == j, columns[j][0], begin)
            end = tl.where(bank == j, columns[j][1], end)
            shift = tl.where(bank == j, columns[j][2] - columns[j][0], shift)
    n = (begin + split * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    n_ok = n < end
    width = R
    if SHARED:
        width = rank

    gates = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if logits_partial_ptr is not None:
        every = tl.arange(0, BLOCK_E)
        in_logits = t_ok[:, None] & (every < E)[None, :]
        logits = load_total(
            logits_partial_ptr, SPLITS, T, t0, BANKS * E, bank * E + every, in_logits, BLOCK_T
        )
        gates = route(
            logits, biases, top_p, threshold, routing, split, t0, t, t_ok, every, every < E, T, E,
            bank * E, K, GATE, RENORMALIZE,
        )  # fmt: skip

    y = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for first in range(0, E * TILE_R, BLOCK_R):
        column = first + tl.arange(0, BLOCK_R)
        e = column // TILE_R
        if offsets_ptr is None:
            row = e * rank + column % TILE_R
            row_ok = (e < E) & (column % TILE_R < rank)
        else:
            row = tl.load(offsets_ptr + e, mask=e < E, other=0) + column % TILE_R
            row_ok = (e < E) & (row < tl.load(offsets_ptr + e + 1, mask=e < E, other=0))
        if logits_partial_ptr is not None:
            e_of_t = tl.broadcast_to(tl.minimum(e, BLOCK_E - 1)[None, :], (BLOCK_T, BLOCK_R))
            gate = tl.gather(gates, e_of_t, 1)
        else:
            gate = scatter_slots(routing.indices, routing.weights, t, t_ok, e, row_ok, K)
        gate *= tl.load(scaling_ptr + bank * E + e, mask=e < E, other=0.0)[None, :]
        saves = (split == 0) & (s_ptr is not None)
        if saves | (tl.max(tl.max((gate != 0).to(tl.int32), 1), 0) > 0):
            s_row = row
            if SHARED:
                s_row = column % TILE_R
            in_s = t_ok[:, None] & row_ok[None, :]
            s = load_total(
                s_partial_ptr, SPLITS, T, t0, BANKS * width, bank * width + s_row, in_s, BLOCK_T
            )
            if s_ptr is not None:
                if SHARED:  # stored once, with the first expert
                    in_s &= (e == 0)[None, :]
                tl.store(rows_of(s_ptr, t0, width, s_row, BLOCK_T), s, mask=in_first(in_s, split))
            h = round_to(tl.where(gate != 0, s * gate, 0.0), y_ptr.dtype.element_ty)
            b = b_ptr + row[:, None].to(tl.int64) * stride_br + n + shift
            b = tl.load(b, mask=row_ok[:, None] & n_ok, other=0.0)
            y = dot(h, convert(b, h.dtype), y, PRECISION)

    in_y = t_ok[:, None] & n_ok
    if base_ptr is not None:
        base = tl.load(base_ptr + t[:, None] * stride_baset + n, mask=in_y, other=0.0)
        y += widen(base)
    y = round_to(y, y_ptr.dtype.element_ty)
    tl.store(y_ptr + t[:, None] * D_out + n, y, mask=in_y)


def decode(x, w, biases, base, experts, routing, gate):
    """y (T, D_out), the router's decision (None if `routing` is given), S (T, R or r)."""
    a, b = experts.a, experts.b
    T, E, (_, D_out) = len(x), len(experts.scaling), b.shape
    s_partial, logits_partial = shrink_splits(x, a, w, few_tokens=True)
    results = None
    if w is None:
        logits_partial = None
    elif E > MAX_EXPERTS or T == 0:  # this many need a separate launch
        results = decide(*totals(logits_partial), biases, gate)
        routing, logits_partial = RoutingBuffers(*results[:2]), None
    tile = choose("decode", x, experts.TILE_R)
    if routing is None:
        routing = new_routing(x, E, gate["K"], tile["BLOCK_T"])
    s, y = x.new_empty(T, len(a), dtype=torch.float32), x.new_empty(T, D_out)
    if T:
        partials = s_partial, logits_partial
        _launch(x, partials, [(0, D_out, 0)], biases, base, experts, E, routing, s, y, gate, tile)
    return y, results or (None if w is None else routing.results()), s


def _launch(x, partials, columns, biases, base, experts, E, routing, s, y, gate, tile):
    (s_partial, logits_partial), b = partials, experts.b
    tiles = max(triton.cdiv(end - begin, tile["BLOCK_N"]) for begin, end, _ in columns)
    launch(
        x,
        _decode_kernel,
        (triton.cdiv(len(x), tile["BLOCK_T"]), tiles * len(columns)),
        *(s_partial, logits_partial, len(s_partial), tuple(columns), tiles, biases),
        *(b, b.stride(0), base, 0 if base is None else base.stride(0)),
        *(experts.scaling, experts.offsets, experts.rank, routing, s, y),
        *(len(x), E, len(b), y.shape[1]),
        SHARED=experts.shared_a,
        BANKS=len(columns),
        TILE_R=experts.TILE_R,
        BLOCK_E=16 if logits_partial is None else max(16, triton.next_power_of_2(E)),
        PRECISION=precision(x),
        **gate,
        **tile,
    )


def decode_banks(x, w, biases, base, experts, columns, gate, y):
    """Writes y (T, D_out): base plus the experts of banks that are contiguous in all operands.

    w (BANKS E, D_in), experts.a (BANKS R or r, D_in), experts.b (R, columns of all banks), biases and scaling
    (BANKS E,); `columns` as in the kernel.
    """
    E = len(w) // len(columns)
    partials = shrink_splits(x, experts.a, w, few_tokens=True)
    tile = choose("decode", x, experts.TILE_R)
    _launch(x, partials, columns, biases, base, experts, E, None, None, y, gate, tile)
