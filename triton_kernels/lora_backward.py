"""Gradients of grouped_lora and routed_lora: one pass over dy to rank space, then skinny matmuls.

    dS, H, dlogits from rank_gradient      dx = [dS | dlogits] @ [A ; W]
    dB = H^T dy                            [dA ; dW] = [dS | dlogits]^T x

Four launches, each skipped when its gradient is not needed; dy and x are read twice, dx is written once.
"""

from .expand import expand
from .gram import gram, gram_pair
from .launching import bundle_experts, require_rank_dense, require_supported
from .rank_gradient import rank_gradient
from .router_topk import Routing, gate_options
from .router_topk_backward import aux_gradients


def grouped_lora_backward(
    dy, x, a, b, s, indices, weights, scaling, offsets, shared_a,
    frozen, need_x, need_w, need_a, need_b, plan,
):  # fmt: skip
    """dx, dweights, da, db; empty where not needed."""
    require_rank_dense(plan)
    require_supported(dy, x, a, b)
    kinds, (a, b) = (a.dtype, b.dtype), (a.to(x.dtype), b.to(x.dtype))
    routing = Routing(indices.contiguous(), weights.contiguous())
    experts = bundle_experts(None, b, scaling, offsets, shared_a)
    gate = gate_options(indices.shape[1])
    ds, h, dweights = rank_gradient(dy, s.contiguous(), routing, experts, gate, aux_gradients())
    dx = expand(ds, a, None, None, None, x.dtype) if need_x else x.new_empty(0)
    da = gram(ds, x) if need_a else s.new_empty(0)
    db = gram(h, dy) if need_b else s.new_empty(0)
    zero_frozen_rows(da, db, frozen, offsets, shared_a)
    return dx, dweights if need_w else s.new_empty(0), da.to(kinds[0]), db.to(kinds[1])


def routed_lora_backward(
    dy, dweights, dlogits, dmean_prob, dlse, x, w, a, b, s, indices, weights, logits,
    scaling, offsets, shared_a, gate, renormalize, frozen, need_x, need_w, need_a, need_b, plan,
):  # fmt: skip
    """dx, dw, da, db; empty where not needed."""
    require_rank_dense(plan)
    require_supported(dy, x, w, a, b)
    kinds, (a, b) = (a.dtype, b.dtype), (a.to(x.dtype), b.to(x.dtype))
    routing = Routing(indices.contiguous(), weights.contiguous(), logits.contiguous())
    experts = bundle_experts(None, b, scaling, offsets, shared_a)
    gate = gate_options(indices.shape[1], gate, renormalize)
    aux = aux_gradients(dweights, dlogits, dmean_prob, dlse)
    ds, h, dlogits = rank_gradient(dy, s.contiguous(), routing, experts, gate, aux)
    dx = expand(ds, a, dlogits, w, None, x.dtype) if need_x else x.new_empty(0)
    da, dw = s.new_empty(0), s.new_empty(0)
    if need_a and need_w:
        da, dw = gram_pair(ds, dlogits, x)
    elif need_a:
        da = gram(ds, x)
    elif need_w:
        dw = gram(dlogits, x)
    db = gram(h, dy) if need_b else s.new_empty(0)
    zero_frozen_rows(da, db, frozen, offsets, shared_a)
    return dx, dw.to(w.dtype), da.to(kinds[0]), db.to(kinds[1])


def zero_frozen_rows(da, db, frozen, offsets, shared_a):
    """A frozen expert still passes gradient on to x and the router; its own rows stay still."""
    for expert in frozen:
        rows = slice(offsets[expert], offsets[expert + 1])
        if db.numel():
            db[rows] = 0
        if da.numel() and not shared_a:
            da[rows] = 0
