"""routed_lora and grouped_lora, by plan:

    rank_dense   `shrink`, then `rank_dense`; where S of all experts does not fit, `shrink`, gate and `expand`
    segmented    tokens sorted by expert: `segmented_shrink`, `segmented_expand`
    decode       `shrink` in splits of D_in, then `decode` over splits of D_out

With slots kept apart or summed (slots.py), the segmented plan runs.

Each plan computes the same formula; lora_moe/plan.py chooses.
"""

import torch

from .decode import decode
from .expand import expand
from .experts import bundle_experts
from .gate_ranks import gate_ranks
from .operands import require_supported, rows_contiguous
from .rank_dense import rank_dense
from .router_topk import (
    NO_BIASES,
    RoutingBuffers,
    biases_of,
    decide,
    gate_options,
    router_topk,
)
from .segmented_expand import segmented_expand
from .segmented_shrink import segmented_shrink, segments_of
from .shrink import shrink
from .slots import of_each_slot, segments_of_slots
from .sort_tokens import sort_slots


def routed_lora(
    x, w, a, b, base, bias, router_bias, scaling, offsets, shared_a, top_k, gate, renormalize,
    top_p, threshold, plan,
):  # fmt: skip
    """y (T, D_out), indices, weights, logits, mean_prob, lse, counts, S."""
    require_supported(x, w, a, b)
    x, base = rows_contiguous(x), rows_contiguous(base)
    experts = bundle_experts(a, b, scaling, offsets, shared_a)
    router = top_k, gate, renormalize, top_p, threshold
    if plan == "segmented":
        routing = router_topk(x, w, bias, router_bias, *router)
        y, s = _segmented(x, base, RoutingBuffers(*routing[:2]), experts)
        return y, *routing, s
    biases = biases_of(bias, router_bias)
    if plan == "decode":
        y, routing, s = decode(x, w, biases, base, experts, None, gate_options(*router))
        return y, *routing, s
    return _rank_dense(x, w, biases, base, experts, gate_options(*router))


def grouped_lora(x, a, b, base, indices, weights, scaling, offsets, shared_a, slots, plan):
    """y (T, D_out), or (T*K, D_out) by slot; S."""
    require_supported(x, a, b)
    x, base = rows_contiguous(x), rows_contiguous(base)
    experts = bundle_experts(a, b, scaling, offsets, shared_a)
    routing = RoutingBuffers(indices.contiguous(), weights.contiguous())
    if slots != "none":
        return _of_slots(x, base, routing, experts, slots)
    if plan == "segmented":
        return _segmented(x, base, routing, experts)
    if plan == "decode":
        gate = gate_options(indices.shape[1])
        y, _, s = decode(x, None, NO_BIASES, base, experts, routing, gate)
        return y, s
    if len(x) == 0 or not experts.fit_registers:
        s, _ = shrink(x, a, None)
        return _expand_gated(s, routing, experts, base, x.dtype), s
    gate = gate_options(indices.shape[1])
    y, _, s = rank_dense(x, None, NO_BIASES, experts, base, routing, gate)
    return y, s


def _rank_dense(x, w, biases, base, experts, gate):
    if len(x) == 0 or not experts.fit_registers:
        s, logits = shrink(x, experts.a, w)
        routing = decide(logits, biases, gate)
        return _expand_gated(s, RoutingBuffers(*routing[:2]), experts, base, x.dtype), *routing, s
    y, routing, s = rank_dense(x, w, biases, experts, base, None, gate)
    return y, *routing, s


def _segmented(x, base, routing, experts):
    s = shrink(x, experts.a, None)[0] if experts.shared_a else None
    if len(x) == 0:
        columns = experts.largest * (1 if experts.shared_a else routing.indices.shape[1])
        return x.new_empty(0, experts.b.shape[1]), x.new_empty(0, columns, dtype=torch.float32)
    segments = segments_of(x, routing.indices, experts)
    if s is None:
        s = segmented_shrink(x, experts.a, routing.indices, experts, segments)
    y = segmented_expand(s, routing, experts.b, None, None, base, segments, experts, x.dtype)
    return y, s.view(len(x), -1)


def _of_slots(x, base, routing, experts, slots):
    """y, (T*K, D_out) apart or (T, D_out) summed, and S (T, K*r)."""
    (T, K), apart = routing.indices.shape, slots == "apart"
    if T * K == 0:
        y = x.new_zeros(0 if apart else T, experts.b.shape[1])
        s = x.new_empty(T, K * experts.largest, dtype=torch.float32)
        return y if base is None or apart else base + y, s
    each = of_each_slot(routing)
    order, _ = sort_slots(each.indices, len(experts.scaling))
    segments = segments_of_slots(x, each.indices, order, experts)
    s = segmented_shrink(x, experts.a, each.indices, experts, segments)
    if not apart:
        each, segments = routing, segments_of(x, routing.indices, experts)
    y = segmented_expand(s, each, experts.b, None, None, base, segments, experts, x.dtype)
    return y, s.view(T, -1)


def _expand_gated(s, routing, experts, base, dtype):
    h = gate_ranks(s, routing, experts, dtype)
    return expand(h, experts.b, None, None, base, dtype)
