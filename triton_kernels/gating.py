"""Computations in registers between the two matmuls: top-k, gates, and their gradients.

A tile of ranks has TILE_E * TILE_R columns: TILE_E experts of TILE_R ranks each, both powers of two, with
TILE_R at least the largest rank.  Viewed as (BLOCK_T, TILE_E, TILE_R), the gate of an expert is a broadcast
and its gradient a sum along the last axis; unequal ranks only change which rows of A the columns stand for.

Letters: T tokens, E experts, K picked experts per token.
"""

import triton
import triton.language as tl

from .numerics import in_first, rows_of


@triton.jit
def expert_rows(offsets_ptr, rank, first, E, TILE_E: tl.constexpr, TILE_R: tl.constexpr):
    """Rows of A and B for the TILE_E * TILE_R columns of experts first.., and whether they exist."""
    column = tl.arange(0, TILE_E * TILE_R)
    e = first + column // TILE_R
    if offsets_ptr is None:
        start = e * rank
        stop = start + rank
    else:
        start = tl.load(offsets_ptr + e, mask=e < E, other=0)
        stop = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    row = start + column % TILE_R
    return row, (e < E) & (row < stop)


@triton.jit
def saved_rows(
    offsets_ptr, rank, first, E, R, TILE_E: tl.constexpr, TILE_R: tl.constexpr, SHARED: tl.constexpr
):
    """The same for the columns of S, and how many a token has: with a shared A, only one expert's."""
    if SHARED:
        row, row_ok = expert_rows(None, rank, 0, 1, 1, TILE_R)
        width = rank
    else:
        row, row_ok = expert_rows(offsets_ptr, rank, first, E, TILE_E, TILE_R)
        width = R
    return row, row_ok, width


@triton.jit
def gate_values(logits, e_ok, GATE: tl.constexpr):
    """Gate of every expert and the logsumexp of the logits.  (BLOCK_T, E) -> (BLOCK_T, E), (BLOCK_T,)

    As in PyTorch, a NaN among the logits, or an infinite maximum, makes a softmax NaN.
    """
    logits = tl.where(e_ok[None, :], logits, float("-inf"))
    top = tl.max(tl.where(logits == logits, logits, float("-inf")), 1)
    finite = tl.abs(top) != float("inf")
    shift = tl.where(finite, top, 0.0)
    u = tl.exp(logits - shift[:, None])
    z = tl.sum(u, 1)
    if GATE == "softmax":
        p = tl.where(finite[:, None], u / z[:, None], float("nan"))
    else:
        small = tl.exp(-tl.abs(logits))
        p = tl.where(logits >= 0, 1.0, small) / (1.0 + small)
    return tl.where(e_ok[None, :], p, 0.0), tl.log(z) + shift


@triton.jit
def topk(p, bias_ptr, first_bias, top_p, threshold, e, e_ok, K: tl.constexpr):
    """Ids and gates of the K experts with the largest p + bias (None: zeros), and a mask of the picked.

    Ties go to the lower id, and NaN comes last.  A mask of free experts, rather than a sentinel in the
    scores, prevents an id from being picked twice.  A picked expert is dropped (id -1, gate 0) if its p
    is below the threshold or if the p before it sum to top_p. (BLOCK_T, E) -> (BLOCK_T, K padded) twice,
    (BLOCK_T, E)
    """
    score = p
    if bias_ptr is not None:
        score += tl.load(bias_ptr + first_bias + e, mask=e_ok, other=0.0)[None, :]
    score = tl.where(score == score, score, float("-inf"))
    free = tl.broadcast_to(e_ok[None, :], p.shape)
    picked = free & (e[None, :] < 0)
    before = tl.zeros((p.shape[0],), tl.float32)
    slot = tl.arange(0, triton.next_power_of_2(K))[None, :]
    ids = tl.zeros((p.shape[0], slot.shape[1]), tl.int32)
    gates = tl.zeros((p.shape[0], slot.shape[1]), tl.float32)
    for j in range(K):
        best = tl.max(tl.where(free, score, float("-inf")), 1)
        first = tl.min(tl.where(free & (score == best[:, None]), e[None, :], p.shape[1]), 1)
        hit = e[None, :] == first[:, None]
        value = tl.sum(tl.where(hit, p, 0.0), 1)
        dropped = (value < threshold) | (before >= top_p)
        ids = tl.where(slot == j, tl.where(dropped, -1, first)[:, None], ids)
        gates = tl.where(slot == j, tl.where(dropped, 0.0, value)[:, None], gates)
        picked = picked | (hit & (dropped == 0)[:, None])
        free = free & (e[None, :] != first[:, None])
        before += value
    return ids, gates, picked


@triton.jit
def route(
    logits,
    biases,
    top_p,
    threshold,
    out,
    split,
    t0,
    t,
    t_ok,
    e,
    e_ok,
    T,
    E,
    first_bias,
    K: tl.constexpr,
    GATE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """Pick K experts, store the routing and this tile's share of the statistics, return the gate.

    biases.router is added to the logits, which are stored with it unless out.logits is None; the
    experts' biases start at first_bias.  If `out` is None, nothing is stored. If several programs decide
    on the same tokens, only the first (split 0) stores. (BLOCK_T, E) -> (BLOCK_T, E), zero where not
    picked
    """
    if biases.router is not None:
        logits += tl.load(biases.router + first_bias + e, mask=e_ok, other=0.0)[None, :]
    p, lse = gate_values(logits, e_ok, GATE)
    ids, weights, picked = topk(p, biases.selection, first_bias, top_p, threshold, e, e_ok, K)
    gate = p
    if RENORMALIZE:
        z = nonzero(tl.sum(weights, 1))[:, None]
        weights = weights / z
        gate = gate / z

    if out is not None:
        slot = tl.arange(0, ids.shape[1])
        stored, e_stored = in_first(t_ok, split), in_first(e_ok, split)
        filled = stored[:, None] & (slot < K)[None, :]
        tl.store(rows_of(out.indices, t0, K, slot, p.shape[0]), ids, mask=filled)
        tl.store(rows_of(out.weights, t0, K, slot, p.shape[0]), weights, mask=filled)
        if out.logits is not None:
            inside = stored[:, None] & e_ok[None, :]
            tl.store(rows_of(out.logits, t0, E, e, p.shape[0]), logits, mask=inside)
        tl.store(out.lse + t, lse, mask=stored)

        tile = tl.program_id(0).to(tl.int64) * E + e
        mean_prob = tl.sum(tl.where(t_ok[:, None], p, 0.0), 0) / T
        tl.store(out.mean_prob + tile, mean_prob, mask=e_stored)
        counts = tl.sum((picked & t_ok[:, None]).to(tl.int32), 0)
        tl.store(out.counts + tile, counts, mask=e_stored)
    return tl.where(picked, gate, 0.0)


@triton.jit
def nonzero(z):
    """Gates that all underflowed to zero stay zero instead of turning into 0 / 0."""
    return tl.where(z == 0, 1.0, z)


@triton.jit
def narrow(v, N: tl.constexpr):
    """The first N columns of a tile whose other columns are zero."""
    if v.shape[1] != N:
        v = tl.sum(tl.reshape(v, (v.shape[0], v.shape[1] // N, N)), 1)
    return v


@triton.jit
def scatter_slots(indices_ptr, values_ptr, t, t_ok, e, e_ok, K: tl.constexpr):
    """The sum of the slots' values per expert, or their number.  (T, K) -> (BLOCK_T, E)

    An id outside 0..E-1 is an empty slot; repeated ids add up.
    """
    total = tl.zeros((t.shape[0], e.shape[0]), tl.float32)
    for j in range(K):
        index = tl.load(indices_ptr + t * K + j, mask=t_ok, other=-1)
        hit = (index[:, None] == e[None, :]) & e_ok[None, :]
        if values_ptr is None:
            total += hit.to(tl.float32)
        else:
            value = tl.load(values_ptr + t * K + j, mask=t_ok, other=0.0)
            total += tl.where(hit, value[:, None], 0.0)
    return total


@triton.jit
def gather_slots(v, out_ptr, indices_ptr, t, t_ok, e, e_ok, K: tl.constexpr):
    """Store v of each slot's expert, if the expert is in this tile.  (BLOCK_T, E) -> (T, K)"""
    for j in range(K):
        index = tl.load(indices_ptr + t * K + j, mask=t_ok, other=-1)
        hit = (index[:, None] == e[None, :]) & e_ok[None, :]
        value = tl.sum(tl.where(hit, v, 0.0), 1)
        found = tl.max(hit.to(tl.int32), 1) == 1
        tl.store(out_ptr + t * K + j, value, mask=t_ok & found)


@triton.jit
def share_of_slots(weights_ptr, dweights_ptr, t, t_ok, K: tl.constexpr):
    """sum of dw w over a token's slots.  (T, K) -> (BLOCK_T,)"""
    share = tl.zeros((t.shape[0],), tl.float32)
    for j in range(K):
        w = tl.load(weights_ptr + t * K + j, mask=t_ok, other=0.0)
        share += w * tl.load(dweights_ptr + t * K + j, mask=t_ok, other=0.0)
    return share


@triton.jit
def apply_gate(s, gate, TILE_E: tl.constexpr, TILE_R: tl.constexpr):
    """H: S times the gate of its expert; zero if the gate is zero, whatever S contains.

    S (BLOCK_T, TILE_E * TILE_R), or (BLOCK_T, TILE_R) shared by the experts; gate (BLOCK_T, TILE_E).
    """
    h = multiply_gated(by_expert(s, TILE_R), gate)
    return tl.reshape(h, (gate.shape[0], TILE_E * TILE_R))


@triton.jit
def apply_gate_backward(
    g, s, gate, picked, TILE_E: tl.constexpr, TILE_R: tl.constexpr, SHARED: tl.constexpr
):
    """From G = dy B^T: dS, H, and the sum of G S over the rows of each picked expert (BLOCK_T, TILE_E)."""
    dgate = tl.sum(by_expert(g, TILE_R) * by_expert(s, TILE_R), 2)
    ds = multiply_gated(by_expert(g, TILE_R), gate)
    if SHARED:
        ds = tl.sum(ds, 1)
    else:
        ds = tl.reshape(ds, (gate.shape[0], TILE_E * TILE_R))
    return ds, apply_gate(s, gate, TILE_E, TILE_R), tl.where(picked > 0, dgate, 0.0)


@triton.jit
def by_expert(v, TILE_R: tl.constexpr):
    """(BLOCK_T, TILE_E * TILE_R) -> (BLOCK_T, TILE_E, TILE_R);  (BLOCK_T, TILE_R) -> (BLOCK_T, 1, TILE_R)"""
    return tl.reshape(v, (v.shape[0], v.shape[1] // TILE_R, TILE_R))


@triton.jit
def multiply_gated(v, gate):
    gate = gate[:, :, None]
    return tl.where(gate != 0, v * gate, 0.0)


@triton.jit
def router_gradient(
    logits,
    dgate,
    picked,
    share,
    aux,
    t0,
    t,
    t_ok,
    e,
    e_ok,
    T,
    E,
    GATE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """Gradient of the logits.  dgate (BLOCK_T, E) sums dweights over an expert's slots.

    With w = p / z, z the sum of the picked gates:  dp_e = (dw_e - share) / z,  share = sum of dw w.
    Softmax:  dlogits = p (dp - sum of p dp);   sigmoid:  dlogits = p (1 - p) dp.
    """
    p, _lse = gate_values(logits, e_ok, GATE)
    dp = dgate
    if RENORMALIZE:
        z = nonzero(tl.sum(tl.where(picked > 0, picked * p, 0.0), 1))
        dp = (dgate - picked * share[:, None]) / z[:, None]
    if aux.dmean_prob is not None:
        dp += (tl.load(aux.dmean_prob + e, mask=e_ok, other=0.0) / T)[None, :]
    if GATE == "softmax":
        out = p * (dp - tl.sum(p * dp, 1)[:, None])
    else:
        out = p * (1.0 - p) * dp
    if aux.dlse is not None:
        dlse = tl.load(aux.dlse + t, mask=t_ok, other=0.0)
        softmax, _ = gate_values(logits, e_ok, "softmax")
        out += softmax * dlse[:, None]
    if aux.dlogits is not None:
        inside = t_ok[:, None] & e_ok[None, :]
        out += tl.load(rows_of(aux.dlogits, t0, E, e, p.shape[0]), mask=inside, other=0.0)
    return out
