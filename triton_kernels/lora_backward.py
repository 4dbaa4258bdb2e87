"""Gradients of grouped_lora and routed_lora: one pass over dy to rank space, then skinny matmuls.

    dS, H, dlogits from dy B^T             dx = [dS | dlogits] @ [A ; W]
    dB = H^T dy                            [dA ; dW] = [dS | dlogits]^T x
    drouter_bias = dlogits^T 1

Four launches and one that adds up partial sums, each skipped if its gradient is not needed; dy and x
are read twice, dx is written once.  The segmented plan does the same on sorted slots and tokens.
"""

import functools

import torch

from .add_splits import add_splits
from .expand import expand
from .experts import bundle_experts
from .operands import require_supported, rows_contiguous
from .rank_gradient import rank_gradient
from .router_topk import RoutingBuffers
from .router_topk_backward import aux_gradients, logits_gradient
from .segmented_expand import segmented_expand
from .segmented_rank_gradient import segmented_rank_gradient
from .segmented_shrink import segments_of
from .segmented_wgrad import segmented_wgrad, sorted_slots
from .slots import segments_of_slots
from .wgrad import Weight, wgrad, wgrad_splits
from .write_table import write_table


def grouped_lora_backward(
    dy, x, a, b, s, indices, weights, scaling, offsets, shared_a,
    slots, frozen, need_x, need_router, need_a, need_b, plan,
):  # fmt: skip
    """dx, dweights, da, db; empty if not needed."""
    require_supported(dy, x, a, b)
    routing = RoutingBuffers(indices.contiguous(), weights.contiguous())
    experts = bundle_experts(a, b, scaling, offsets, shared_a)
    call = rows_contiguous(dy), rows_contiguous(x), None, s, routing, experts, frozen
    if slots != "none":
        grad = OfSlots(*call, slots)
    else:
        grad = (Segmented if plan == "segmented" else RankDense)(*call, None)
    dx, da, _, db = grad.results(need_x, need_a, False, need_b)
    return dx, grad.dweights if need_router else s.new_empty(0), da, db


def routed_lora_backward(
    dy, dweights, dlogits, dmean_prob, dlse, x, w, a, b, s, indices, weights, logits,
    scaling, offsets, shared_a, gate, renormalize, frozen, need_x, need_router, need_a, need_b,
    need_router_bias, plan,
):  # fmt: skip
    """dx, dw, da, db, drouter_bias; empty if not needed."""
    require_supported(dy, x, w, a, b)
    routing = RoutingBuffers(indices.contiguous(), weights.contiguous(), logits.contiguous())
    experts = bundle_experts(a, b, scaling, offsets, shared_a)
    router = gate, renormalize, aux_gradients(dweights, dlogits, dmean_prob, dlse)
    backward = Segmented if plan == "segmented" else RankDense
    grad = backward(rows_contiguous(dy), rows_contiguous(x), w, s, routing, experts, frozen, router)
    dx, da, dw, db = grad.results(need_x, need_a, need_router, need_b)
    return dx, dw, da, db, sum_of_rows(grad.dlogits) if need_router_bias else s.new_empty(0)


def sum_of_rows(v):
    """The sum over all rows, in a fixed order.  (T, E) -> (E,), fp32"""
    ones = v.new_ones((1, 1), dtype=torch.float16)  # exact, and never multiplied as TF32
    return wgrad(v, ones.expand(len(v), 1)).view(-1)


class RankDense:
    """dS and H of all rank rows."""

    def __init__(self, dy, x, w, s, routing, experts, frozen, router):
        self.dy, self.x, self.w, self.experts, self.frozen = dy, x, w, experts, frozen
        out = rank_gradient(dy, s.contiguous(), routing, experts, router)
        self.ds, self.h, self.dweights, self.dlogits = out

    def results(self, need_x, need_a, need_router, need_b):
        """dx, da, dw, db; empty if not needed."""
        sums = self.sums(need_a, need_router, need_b)
        dx = self.input() if need_x else self.dy.new_empty(0)
        add_splits(*((partials, out) for partials, out in sums.values() if partials is not None))
        return dx, *(sums[name][1] if name in sums else self.dy.new_empty(0) for name in "awb")

    def sums(self, need_a, need_router, need_b):
        """(partial sums, gradient) of each weight that is needed, all from one launch."""
        of_x, of_dy = {}, {}
        if need_a:
            rows = self.rows(self.experts.shared_a)
            of_x["a"] = Weight(self.ds, self.experts.a.dtype, rows)
        if need_router:
            of_x["w"] = Weight(self.dlogits, self.w.dtype)
        if need_b:
            of_dy["b"] = Weight(self.h, self.experts.b.dtype, self.rows(False))
        found = wgrad_splits(self.x, [*of_x.values()], self.dy, [*of_dy.values()])
        return dict(zip((*of_x, *of_dy), found))

    def input(self):
        return expand(self.ds, self.experts.a, self.dlogits, self.w, None, self.x.dtype)

    def rows(self, shared):
        """The rows that are not frozen, or None for all.  A frozen expert still passes gradients to x."""
        return None if shared or not self.frozen else self.trained_rows

    @functools.cached_property
    def trained_rows(self):
        start, rows = 0, []
        for e, rank in enumerate(self.experts.ranks):
            rows += [] if e in self.frozen else range(start, start + rank)
            start += rank
        return write_table(rows, self.x)


class Segmented(RankDense):
    """dS and H of picked experts only, slot by slot; dx from tiles of sorted tokens."""

    def __init__(self, dy, x, w, s, routing, experts, frozen, router):
        self.dy, self.x, self.w, self.experts, self.frozen = dy, x, w, experts, frozen
        self.indices, self.dlogits = routing.indices, None
        self.slots = sorted_slots(routing.indices, len(experts.scaling))
        out = segmented_rank_gradient(dy, s.contiguous(), routing, experts, self.slots)
        self.ds, self.h, self.dweights = out
        if router is not None:
            self.dlogits = logits_gradient(self.dweights, routing, router)

    def input(self):
        if self.experts.shared_a:
            return expand(self.shared_ds, self.experts.a, self.dlogits, self.w, None, self.x.dtype)
        return self.input_of(
            segments_of(self.x, self.indices, self.experts, "segmented_dx"), self.indices
        )

    def input_of(self, segments, indices):
        """dx of tokens with these indices, whose order and tiles `segments` holds."""
        own, dtype = RoutingBuffers(indices, None), self.x.dtype  # dS includes its gate
        return segmented_expand(
            self.ds, own, self.experts.a, self.dlogits, self.w, None, segments, self.experts, dtype
        )

    @functools.cached_property
    def shared_ds(self):
        """The gradient for a shared A: the sum over a token's slots."""
        return self.ds.sum(1).to(self.x.dtype)

    def sums(self, need_a, need_router, need_b):
        sums = {}
        if need_a and self.experts.shared_a:
            shared = Weight(self.shared_ds, self.experts.a.dtype)
            (sums["a"],) = wgrad_splits(self.x, [shared])
        elif need_a:
            sums["a"] = self.by_expert(self.ds, self.x, self.experts.a.dtype)
        if need_router:
            (sums["w"],) = wgrad_splits(self.x, [Weight(self.dlogits, self.w.dtype)])
        if need_b:
            sums["b"] = self.by_expert(self.h, self.dy, self.experts.b.dtype)
        return sums

    def by_expert(self, h, x, dtype):
        return segmented_wgrad(h, x, self.slots, self.experts, self.frozen_flags, dtype)

    @functools.cached_property
    def frozen_flags(self):
        if not self.frozen:
            return None
        E = len(self.experts.scaling)
        return write_table([int(e in self.frozen) for e in range(E)], self.x)


class OfSlots(Segmented):
    """The same with slots as tokens (slots.py): dx is summed over a token's slots if y was not."""

    def __init__(self, dy, x, w, s, routing, experts, frozen, slots):
        self.apart = slots == "apart"
        super().__init__(dy, x, w, s, routing, experts, frozen, None)

    def input(self):
        if self.indices.numel() == 0:
            return torch.zeros_like(self.x)
        if self.apart:
            return super().input()
        each, order = self.indices.view(-1, 1), self.slots[0]
        segments = segments_of_slots(self.x, each, order, self.experts, "segmented_dx")
        return self.input_of(segments, each)
