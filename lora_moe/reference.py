"""The mathematics of LoRA-MoE in plain PyTorch: the reference that every kernel is tested against.

    y_t = base_t + sum over picked e of  g_te * s_e * B_e A_e x_t

written as one low-rank map with a gate in rank space:  y = base + H @ B,  H = gate(S),  S = x @ A^T.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts together,
r one expert's rank, D_in and D_out the linear's sizes.  A and B are rounded to x's dtype, sums are in fp32
(fp64 for fp64 inputs), and outputs are rounded once.  This is also the fallback backend.
"""

from __future__ import annotations

from itertools import pairwise

import torch

# a top_p that drops nothing: above any sum of gates, and unlike inf valid in JSON, in which saved graphs
# store it
ALL_KEPT = 1e30

GATES = ("softmax", "sigmoid")  # see gate_values


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def expert_of_row(offsets, device=None) -> torch.Tensor:
    """The expert of each row of B.  offsets (E+1) -> (R,)"""
    ranks = torch.tensor(offsets, device=device).diff()
    return torch.repeat_interleave(torch.arange(len(offsets) - 1, device=device), ranks)


def select_topk(scores, k):
    """Ids of the k largest scores, largest first, ties to the lower id, NaN last.  (T, E) -> (T, K)"""
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]


def gate_values(logits, gate):
    return torch.softmax(logits, dim=1) if gate == "softmax" else torch.sigmoid(logits)


def router_topk(x, w, bias, router_bias, top_k, gate, renormalize, top_p=ALL_KEPT, threshold=0.0):
    """route_logits of x W^T + router_bias.

    Returns indices (T, K) int32, weights (T, K), logits (T, E), mean_prob (E,), lse (T,), counts (E,).
    """
    acc = accumulator(x.dtype)
    logits = x.to(acc) @ w.to(acc).T  # (T, E)
    if router_bias is not None:
        logits = logits + router_bias
    ids, weights, *rest = route_logits(logits, bias, top_k, gate, renormalize, top_p, threshold)
    return ids, weights, logits, *rest


def route_logits(logits, bias, top_k, gate, renormalize, top_p=ALL_KEPT, threshold=0.0):
    """p = gate(logits);  ids = top-k of p + bias;  weights = p[ids] (/ their sum).

    A picked expert is dropped if p < threshold, or if the p of the slots before it sum to top_p: its id
    is -1, its weight 0.
    Returns indices (T, K) int32, weights (T, K), mean_prob (E,), lse (T,), counts (E,).
    """
    T, E = logits.shape
    p = gate_values(logits, gate)  # (T, E)
    ids = select_topk(p if bias is None else p + bias, top_k)  # (T, K)
    weights = p.gather(1, ids)  # (T, K)
    before = torch.nn.functional.pad(weights, (1, 0))[:, :-1].cumsum(1)
    dropped = (weights < threshold) | (before >= top_p)
    weights = torch.where(dropped, 0, weights)
    if renormalize:
        weights = weights / _nonzero(weights.sum(1, keepdim=True))
    mean_prob = p.sum(0) / max(T, 1)  # (E,)
    counts = torch.zeros(E, dtype=torch.int64, device=logits.device)
    counts = counts.index_add(0, ids.flatten(), (~dropped).long().flatten())
    ids = torch.where(dropped, -1, ids).int()
    return ids, weights, mean_prob, torch.logsumexp(logits, 1), counts


def router_topk_backward(
    dweights, dlogits, dmean_prob, dlse, indices, weights, logits, gate, renormalize
):
    """Gradient of the logits from those of weights, logits, mean_prob and lse (each may be None)."""
    p = gate_values(logits, gate)  # (T, E)
    kept, ids = indices >= 0, indices.clamp(min=0).long()
    dp = torch.zeros_like(p)
    if dweights is not None:
        if renormalize:  # w = p / z: the component along w cancels
            z = _nonzero(torch.where(kept, p.gather(1, ids), 0).sum(1, keepdim=True))
            dweights = (dweights - (dweights * weights).sum(1, keepdim=True)) / z
        dp = dp.scatter_add(1, ids, torch.where(kept, dweights, 0))
    if dmean_prob is not None:
        dp = dp + dmean_prob / max(len(p), 1)
    if gate == "softmax":
        out = p * (dp - (p * dp).sum(1, keepdim=True))
    else:
        out = dp * p * (1 - p)
    if dlse is not None:
        out = out + torch.softmax(logits, 1) * dlse[:, None]
    return out if dlogits is None else out + dlogits


def shrink(x, a, w=None):
    """S = x A^T (T, R) and logits = x W^T (T, E), accumulated and returned in fp32 (fp64)."""
    acc = accumulator(x.dtype)
    x = x.to(acc)
    logits = x.new_empty(len(x), 0) if w is None else x @ w.to(acc).T
    return x @ a.to(acc).T, logits


def expand(h, b, h2=None, b2=None, base=None, dtype=None):
    """y = base + H B + H2 B2, summed in H's dtype and rounded once to `dtype`.  (T, R) -> (T, D_out)"""
    y = h @ b.to(h.dtype)
    if h2 is not None:
        y = y + h2 @ b2.to(h.dtype)
    if base is not None:
        y = y + base.to(h.dtype)
    return y.to(dtype or b.dtype)


def wgrad(h, x):
    """H^T x, summed over the tokens.  (T, R), (T, D) -> (R, D) in H's dtype"""
    return h.T @ x.to(h.dtype)


def spread_gate(indices, weights, scaling, offsets):
    """g_te s_e for every row of B, and whether e was picked.  (T, K) -> (T, R) twice

    An id of -1 is an empty slot; weights of repeated ids add up.  The mask excludes NaN in rows of experts
    that were not picked, which a zero gate would not.
    """
    valid = (indices >= 0) & (indices < len(scaling))
    ids = torch.where(valid, indices, 0).long()  # (T, K)
    zero = weights.new_zeros(len(indices), len(scaling))  # (T, E)
    gate = zero.scatter_add(1, ids, torch.where(valid, weights, 0)) * scaling
    picked = zero.scatter_add(1, ids, valid.to(zero.dtype)) > 0
    rows = expert_of_row(offsets, indices.device)
    return gate[:, rows], picked[:, rows]


def slots_of_rows(s, indices, offsets):
    """S of the picked experts by slot, each as wide as the largest rank.  (T, R) -> (T, K r)"""
    zero = s.new_zeros(len(s), 1)
    return torch.cat([s, zero], 1).gather(1, _rows_of_picked(indices, offsets))


def rows_of_slots(slots, indices, offsets):
    """The inverse of slots_of_rows; zero for experts that a token did not pick.  (T, K r) -> (T, R)"""
    s = slots.new_zeros(len(slots), offsets[-1] + 1)
    return s.scatter(1, _rows_of_picked(indices, offsets), slots)[:, :-1]


def _rows_of_picked(indices, offsets):
    """The rank row of every column of the slots, R if there is none.  (T, K) -> (T, K r)"""
    starts = torch.tensor(offsets, device=indices.device)
    largest = max(stop - start for start, stop in pairwise(offsets))
    ranks, column = starts.diff(), torch.arange(largest, device=indices.device)
    rows = torch.where(column < ranks[:, None], starts[:-1, None] + column, offsets[-1])  # (E, r)
    rows = torch.cat([rows, torch.full_like(rows[:1], offsets[-1])])  # id -1 is the last
    E = len(ranks)
    ids = torch.where((indices >= 0) & (indices < E), indices, E).long()
    return rows[ids].flatten(1)


def repeat_shared(s, offsets, shared_a):
    """S with one column per row of B; with a shared A its r columns are repeated for each expert."""
    return s.repeat(1, len(offsets) - 1) if shared_a else s


def grouped_lora(x, a, b, base, indices, weights, scaling, offsets, shared_a):
    """y = base + gate(x A^T) B with a given routing.  Returns y (T, D_out), S (T, R or r)."""
    s, _ = shrink(x, a.to(x.dtype))
    gate, picked = spread_gate(indices, weights, scaling, offsets)
    h = torch.where(picked, repeat_shared(s, offsets, shared_a) * gate, 0)  # (T, R)
    return expand(h, b.to(x.dtype), base=base, dtype=x.dtype), s


def grouped_lora_backward(dy, x, a, b, s, indices, weights, scaling, offsets, shared_a):
    """Gradients of x, weights, a, b.

    G = dy B^T;  dS = G g s;  dg_te = s_e sum over rows r of e of G_tr S_tr;  dB = H^T dy;
    dA = dS^T x;  dx = dS A.
    """
    a, b = a.to(x.dtype), b.to(x.dtype)
    ds, dweights, h = rank_gradient(dy, b, s, indices, weights, scaling, offsets, shared_a)
    return expand(ds, a, dtype=x.dtype), dweights, wgrad(ds, x), wgrad(h, dy)


def slot_lora(x, a, b, base, indices, weights, scaling, offsets, shared_a, slots):
    """grouped_lora with one row per slot in y (T K, D_out) ("apart"), or in x (T K, D_in), summed ("sum").

    Computes each slot as a separate token with one expert.  base is (T, D_out), or has y's shape.
    Returns y and S of the slots (T, K r), r the largest rank.
    """
    T, K = indices.shape
    alone = indices.reshape(-1, 1), weights.reshape(-1, 1)
    acc, largest = accumulator(x.dtype), max(stop - start for start, stop in pairwise(offsets))
    x = x if slots == "sum" else x.repeat_interleave(K, 0)
    y, s = grouped_lora(
        x.to(acc), a.to(x.dtype), b.to(x.dtype), None, *alone, scaling, offsets, shared_a
    )
    y = y.view(T, K, b.shape[1])
    y = y.sum(1, keepdim=True) if slots == "sum" else y
    if base is not None:
        y = y + base.to(acc).view(T, 1 if len(base) == T else K, y.shape[2])
    return y.flatten(0, 1).to(x.dtype), slots_of_rows(s, alone[0], offsets).view(T, K * largest)


def slot_lora_backward(dy, x, a, b, s, indices, weights, scaling, offsets, shared_a, slots):
    """Gradients of x, weights, a, b."""
    T, K = indices.shape
    alone = indices.reshape(-1, 1), weights.reshape(-1, 1)
    s = rows_of_slots(s.reshape(T * K, s.shape[1] // max(K, 1)), alone[0], offsets)
    dtype, acc = x.dtype, accumulator(x.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if slots == "sum":
        dy = dy.repeat_interleave(K, 0)
    else:
        x = x.repeat_interleave(K, 0)
    experts = scaling, offsets, shared_a
    dx, dweights, da, db = grouped_lora_backward(dy.to(acc), x.to(acc), a, b, s, *alone, *experts)
    dx = dx.view(T, K, dx.shape[1]).sum(1) if slots == "apart" else dx
    return dx.to(dtype), dweights.view(T, K), da, db


def rank_gradient(dy, b, s, indices, weights, scaling, offsets, shared_a):
    """Gradients in rank space: dS (T, R or r), dweights (T, K), and H (T, R)."""
    num_experts = len(scaling)
    gate, picked = spread_gate(indices, weights, scaling, offsets)
    s_rows = repeat_shared(s, offsets, shared_a)
    g = dy.to(s.dtype) @ b.to(s.dtype).T  # (T, R)
    h = torch.where(picked, s_rows * gate, 0)
    ds = torch.where(picked, g * gate, 0)
    dgate = s.new_zeros(len(dy), num_experts)
    dgate = dgate.index_add(
        1, expert_of_row(offsets, dy.device), torch.where(picked, g * s_rows, 0)
    )
    valid = (indices >= 0) & (indices < num_experts)
    ids = torch.where(valid, indices, 0).long()
    dweights = torch.where(valid, (dgate * scaling).gather(1, ids), 0)
    if shared_a:
        ds = ds.unflatten(1, (num_experts, -1)).sum(1)
    return ds, dweights, h


def routed_lora(
    x, w, a, b, base, bias, router_bias, scaling, offsets, shared_a, top_k, gate, renormalize,
    top_p=ALL_KEPT, threshold=0.0,
):  # fmt: skip
    """Router and experts together: grouped_lora of router_topk.  Returns y, the routing, S."""
    router = top_k, gate, renormalize, top_p, threshold
    routing = router_topk(x, w, bias, router_bias, *router)
    y, s = grouped_lora(x, a, b, base, routing[0], routing[1], scaling, offsets, shared_a)
    return y, *routing, s


def routed_lora_backward(
    dy, dweights, dlogits, dmean_prob, dlse, x, w, a, b, s, indices, weights, logits, scaling, offsets,
    shared_a, gate, renormalize,
):  # fmt: skip
    """Gradients of x, w, a, b, router_bias.

    dx = dS A + dlogits W;  [dA ; dW] = [dS | dlogits]^T x;  drouter_bias = sum of dlogits over tokens.
    """
    a, b = a.to(x.dtype), b.to(x.dtype)
    ds, dgate, h = rank_gradient(dy, b, s, indices, weights, scaling, offsets, shared_a)
    dweights = dgate if dweights is None else dgate + dweights
    dlogits = router_topk_backward(
        dweights, dlogits, dmean_prob, dlse, indices, weights, logits, gate, renormalize
    )
    dx = expand(ds, a, dlogits, w, dtype=x.dtype)
    return dx, wgrad(dlogits, x), wgrad(ds, x), wgrad(h, dy), dlogits.sum(0)


def _nonzero(z):
    """Replaces 0 by 1, so that gates that all underflowed to zero stay zero."""
    return torch.where(z == 0, 1, z)
