"""Calls of the public functions, forward and backward, at the shapes whose kernels are worth inspecting.

Add a line to SCENARIOS for each new plan or front end; everything that inspects kernels without a GPU
uses them.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts, D columns of x and of y.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch

from lora_moe import Routing, plan
from lora_moe import functional as F

DEVICE = "meta"


@dataclass(frozen=True)
class Scenario:
    """One call; `plan` None leaves the choice to the cost model."""

    call: object
    T: int
    ranks: tuple[int, ...]
    K: int = 2
    D: int = 4096
    plan: str | None = None
    parameters: torch.dtype | None = None  # of A and B, where not x's

    def run(self, dtype, T=None):
        """Forward and backward; returns the wide operands by name."""
        v = operands(self, dtype, T or self.T)
        with plan.override(self.plan):
            self.call(v, self)
        return v


def operands(scenario, dtype, T):
    D, R, E = scenario.D, sum(scenario.ranks), len(scenario.ranks)

    def leaf(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device=DEVICE, requires_grad=dtype.is_floating_point)

    wide = scenario.parameters or dtype
    a, b = leaf(R, D, dtype=wide), leaf(R, D, dtype=wide)
    return {
        "x": leaf(T, D), "dy": leaf(T, D).detach(), "base": leaf(T, D), "A": a, "B": b,
        "W": leaf(E, D, dtype=torch.float32),
        "ids": leaf(T, scenario.K, dtype=torch.int32), "gates": leaf(T, scenario.K, dtype=torch.float32),
    }  # fmt: skip


def experts(scenario):
    return {"rank_offsets": [0, *accumulate(scenario.ranks)]}


def backward(inputs, outputs, dy):
    """Backward for all outputs that require grad; not .backward(), which copies when it accumulates."""
    outputs = [v for v in outputs if v is not None and v.requires_grad]
    grads = [dy] + [torch.empty_like(v).detach() for v in outputs[1:]]
    torch.autograd.grad(outputs, inputs, grads)


def routed(v, scenario, aux=False, **options):
    y, routing = F.routed_lora(
        v["x"], v["W"], v["A"], v["B"], scenario.K, base=v["base"], **experts(scenario), **options
    )
    more = routing.weights, routing.logits, routing.mean_prob, routing.lse
    backward([v["x"], v["W"], v["A"], v["B"], v["base"]], [y, *(more if aux else ())], v["dy"])


def router_bias(v, scenario):
    bias = v["W"].detach()[:, 0].contiguous().requires_grad_()
    y, routing = F.routed_lora(
        v["x"], v["W"], v["A"], v["B"], scenario.K, router_bias=bias, **experts(scenario)
    )
    backward([v["x"], v["W"], v["A"], v["B"], bias], [y, routing.lse], v["dy"])


def inference(v, scenario):
    with torch.no_grad():
        y, routing = F.routed_lora(v["x"], v["W"], v["A"], v["B"], scenario.K, **experts(scenario))
        F.grouped_lora(v["x"], v["A"], v["B"], routing, base=y, **experts(scenario))
        dense = Routing.from_gates(routing.logits)
        F.grouped_lora(v["x"], v["A"], v["B"], dense, **experts(scenario))


def banks(v, scenario):
    """Four layers with the same input, as in a fused linear."""
    E, D = len(scenario.ranks), v["B"].shape[1] // 4
    apart = (v[name].repeat(4, 1).chunk(4) for name in ("W", "A"))
    scaling = v["W"].new_empty(4 * E).split(E)
    with torch.no_grad():
        F.routed_lora_banks(
            v["x"], *apart, v["B"].split(D, 1), scenario.K, v["base"], starts=range(0, 4 * D, D),
            scaling=scaling, **experts(scenario),
        )  # fmt: skip


def grouped(v, scenario, shared_a=False):
    routing = Routing.from_ids(v["ids"], v["gates"], num_experts=len(scenario.ranks))
    a = v["A"][: scenario.ranks[0]] if shared_a else v["A"]
    y = F.grouped_lora(
        v["x"], a, v["B"], routing, base=v["base"], shared_a=shared_a, **experts(scenario)
    )
    backward([v["x"], v["A"], v["B"], v["base"], v["gates"]], [y], v["dy"])


def of_slots(v, scenario, slots):
    """One row per slot, in y or in x."""
    wide = "dy" if slots == "apart" else "x"
    v[wide] = v[wide].new_empty(*v["ids"].shape, scenario.D).requires_grad_(wide == "x")
    routing = Routing.from_ids(v["ids"], v["gates"], num_experts=len(scenario.ranks))
    y = F.grouped_lora(
        v["x"], v["A"], v["B"], routing, base=v["base"], slots=slots, **experts(scenario)
    )
    backward([v["x"], v["A"], v["B"], v["gates"]], [y], v["dy"])


def logits_given(v, scenario):
    """A router supplied by the caller."""
    logits = v["gates"].detach().new_empty(len(v["x"]), len(scenario.ranks)).requires_grad_()
    routing = Routing.from_logits(logits, scenario.K)
    y = F.grouped_lora(v["x"], v["A"], v["B"], routing, base=v["base"], **experts(scenario))
    backward([v["x"], v["A"], v["B"], v["base"], logits], [y], v["dy"])


def router(v, scenario, **options):
    routing = F.router_topk(v["x"], v["W"], scenario.K, **options)
    outputs = routing.weights, routing.logits, routing.mean_prob, routing.lse
    backward([v["x"], v["W"]], outputs, torch.empty_like(routing.weights).detach())


def matmuls(v, scenario):
    """The two matmuls with a different middle, in fp32 rank space."""
    s, logits = F.shrink(v["x"], v["A"], v["W"])
    y = F.expand(s, v["B"], v["base"])
    backward([v["x"], v["A"], v["B"], v["W"], v["base"]], [y, logits], v["dy"])


MANY_TOKENS, SOME_TOKENS, FEW_TOKENS = 8192, 1024, 16
SCENARIOS = {
    "many tokens": Scenario(routed, MANY_TOKENS, (16,) * 8),
    "some tokens": Scenario(routed, SOME_TOKENS, (16,) * 8),
    "few tokens": Scenario(routed, FEW_TOKENS, (16,) * 8),
    "256 ranks": Scenario(routed, MANY_TOKENS, (16,) * 16),
    "256 ranks, some tokens": Scenario(routed, SOME_TOKENS, (16,) * 16),
    "1024 ranks": Scenario(routed, MANY_TOKENS, (16,) * 64),
    "1024 ranks, few tokens": Scenario(routed, FEW_TOKENS, (16,) * 64),
    "1024 ranks, dense": Scenario(routed, MANY_TOKENS, (16,) * 64, plan="rank_dense"),
    "decode": Scenario(routed, FEW_TOKENS, (16,) * 8, plan="decode"),
    "decode, unequal ranks": Scenario(grouped, FEW_TOKENS, (4, 8, 16, 24), plan="decode"),
    "decode, four banks": Scenario(banks, FEW_TOKENS, (16,) * 8, plan="decode"),
    "segmented": Scenario(routed, MANY_TOKENS, (16,) * 64, plan="segmented"),
    "segmented, few tokens": Scenario(routed, FEW_TOKENS, (16,) * 64, plan="segmented"),
    "segmented, unequal ranks": Scenario(grouped, MANY_TOKENS, (4, 8, 16, 24), plan="segmented"),
    "segmented, shared A": Scenario(
        partial(grouped, shared_a=True), MANY_TOKENS, (16,) * 64, plan="segmented"
    ),
    "segmented, rank 128": Scenario(routed, MANY_TOKENS, (128,) * 16, plan="segmented"),
    "segmented, frozen expert": Scenario(
        partial(routed, frozen=(1,)), MANY_TOKENS, (16,) * 64, plan="segmented"
    ),
    "slots apart": Scenario(partial(of_slots, slots="apart"), MANY_TOKENS, (16,) * 64),
    "slots apart, unequal ranks": Scenario(
        partial(of_slots, slots="apart"), MANY_TOKENS, (4, 8, 16, 24), K=3
    ),
    "slots summed": Scenario(partial(of_slots, slots="sum"), MANY_TOKENS, (16,) * 64),
    "slots summed, few tokens": Scenario(
        partial(of_slots, slots="sum"), FEW_TOKENS, (16,) * 8, K=3
    ),
    "rank 64": Scenario(routed, MANY_TOKENS, (64,) * 8),
    "unequal ranks": Scenario(grouped, MANY_TOKENS, (4, 8, 16, 24)),
    "unequal ranks, few tokens": Scenario(grouped, FEW_TOKENS, (4, 8, 16, 24)),
    "shared A": Scenario(partial(grouped, shared_a=True), MANY_TOKENS, (16,) * 8),
    "auxiliary losses": Scenario(partial(routed, aux=True), MANY_TOKENS, (16,) * 8),
    "router bias": Scenario(router_bias, MANY_TOKENS, (16,) * 8),
    "sigmoid": Scenario(partial(routed, gate="sigmoid", aux=True), MANY_TOKENS, (8,) * 32, K=4),
    "dense": Scenario(routed, MANY_TOKENS, (16,) * 8, K=8),
    "fp32 parameters": Scenario(routed, MANY_TOKENS, (16,) * 8, parameters=torch.float32),
    "frozen expert": Scenario(partial(routed, frozen=(1,)), MANY_TOKENS, (16,) * 8),
    "a scaling for each": Scenario(partial(routed, scaling=[1.0, 2.0] * 4), MANY_TOKENS, (16,) * 8),
    "inference": Scenario(inference, MANY_TOKENS, (16,) * 8),
    "router": Scenario(router, MANY_TOKENS, (1,) * 64, K=8),
    "router of 1024": Scenario(router, MANY_TOKENS, (1,) * 1024, K=8),
    "logits given": Scenario(logits_given, MANY_TOKENS, (16,) * 8),
    "matmuls": Scenario(matmuls, MANY_TOKENS, (16,) * 8),
}
