"""A call of every operator."""

from __future__ import annotations

import torch

from lora_moe import plan, reference

from .cases import sample
from .functions import BACKEND

ops = torch.ops.lora_moe
PLANS = plan.BACKENDS[BACKEND]
PLAN = PLANS[0]
SLOTS_PLAN = "segmented" if "segmented" in PLANS else PLAN


def operator_calls(case, dtype=torch.float32, plan=PLAN):
    """Arguments for every operator, as the autograd.Functions would pass them."""
    v = sample(case, dtype)
    x, w, a, b = (v[k] for k in ("x", "router_weight", "lora_A", "lora_B"))
    router = (case.K, case.gate, case.renormalize, reference.ALL_KEPT, 0.0)
    experts = (v["scaling"], case.offsets, case.shared_a)
    forward = (x, w, a, b, v["base"], v["bias"], v["router_bias"], *experts, *router, plan)
    y, indices, weights, logits, mean_prob, lse, _, s = ops.routed_lora(*forward)
    saved = (x, a, b, s, indices, weights)
    aux = tuple(torch.ones_like(t) for t in (weights, logits, mean_prob, lse))
    dy = torch.ones_like(y)
    needs = ([0], True, True, True, True, plan)
    partial = ([], True, False, False, True, plan)
    apart = () if case.shared_a or plan != SLOTS_PLAN else ("apart", "sum")
    every, every_dy = (t.repeat_interleave(case.K, 0) for t in (x, dy))  # one row per slot
    return {
        "router_topk": [(x, w, v["bias"], v["router_bias"], *router)],
        "route_logits": [(logits, v["bias"], *router)],
        "router_topk_backward": [
            (*aux, indices, weights, logits, *router[1:3]),
            (None, None, None, aux[3], indices, weights, logits, *router[1:3]),
        ],
        "shrink": [(x, a, w), (x, a, None)],
        "expand": [
            (logits, w, None, None, None, dtype),
            (logits, w, logits, w, x, dtype),
        ],
        "wgrad": [(logits, x)],
        "grouped_lora": [
            (x, a, b, v["base"], indices, weights, *experts, "none", plan),
            *(
                (every if slots == "sum" else x, a, b, None, indices, weights, *experts, slots, plan)
                for slots in apart
            ),
        ],
        "grouped_lora_backward": [
            (dy, *saved, *experts, "none", *needs),
            (dy, *saved, *experts, "none", *partial),
            *(
                (every_dy, *saved, *experts, slots, *needs) if slots == "apart"
                else (dy, every, *saved[1:], *experts, slots, *needs)
                for slots in apart
            ),
        ],
        "routed_lora": [forward, (*forward[:4], None, None, None, *forward[7:])],
        "routed_lora_banks": [banks_call(v, case, experts, router, plan)],
        "routed_lora_backward": [
            (dy, *more, x, w, a, b, s, indices, weights, logits, *experts, *router[1:3], *need[:5],
             more is aux, plan)
            for more, need in ((aux, needs), ((None,) * 4, partial))
        ],
    }  # fmt: skip


def banks_call(v, case, experts, router, plan):
    """Arguments with two banks of the same operands, the second for later columns."""
    scaling, offsets, shared_a = experts
    twice = [[v[k]] * 2 for k in ("router_weight", "lora_A", "lora_B")]
    base = torch.cat([v["x"].new_ones(case.T, 2 * case.D_out + 1)], 1)
    biases = [[v[k]] * 2 for k in ("bias", "router_bias")]
    starts = [0, case.D_out + 1]
    return v["x"], *twice, base, *biases, [scaling] * 2, offsets, shared_a, starts, *router, plan
