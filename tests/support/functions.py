"""Calls of the public functions with the operands of a case, and the backend that serves them."""

from __future__ import annotations

import functools

import pytest
import torch

from lora_moe import Routing, backend_info, plan
from lora_moe import functional as F

from . import eager
from .cases import sample
from .compare import assert_accurate

BACKEND = backend_info()["serving"]["cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
if BACKEND != "triton":
    DTYPES.append(torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PARAMETERS = ("x", "router_weight", "lora_A", "lora_B", "base", "router_bias")


def experts_of(case):
    return {"rank_offsets": case.offsets, "shared_a": case.shared_a}


def routed(inputs, case, **more):
    args = (inputs[k] for k in ("x", "router_weight", "lora_A", "lora_B"))
    rest = {k: inputs[k] for k in ("scaling", "base", "bias", "router_bias")}
    return F.routed_lora(*args, case.K, **rest, **experts_of(case), **case.options, **more)


def routing_outputs(y, routing):
    return {
        "y": y,
        "weights": routing.weights,
        "logits": routing.logits,
        "mean_prob": routing.mean_prob,
        "lse": routing.lse,
    }


def cotangents(outputs, seed=7):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=g, dtype=torch.float64) for o in outputs]


def gradients(outputs, dys, inputs, names):
    used = {k: inputs[k] for k in names if inputs[k] is not None}
    grads = torch.autograd.grad(
        outputs, list(used.values()), [d.to(o.dtype) for d, o in zip(dys, outputs, strict=True)]
    )
    return dict(zip(used, grads, strict=True))


def assert_picks_are_top_k(indices, inputs, case):
    """Ids are distinct, and no expert left out beats one picked by more than rounding."""
    p, _ = eager.gates(inputs["x"].double(), inputs["router_weight"], case, inputs["router_bias"])
    score = p if inputs["bias"] is None else p + inputs["bias"].double()
    picked = torch.zeros_like(score, dtype=torch.bool).scatter(1, indices.long(), True)
    assert (picked.sum(1) == case.K).all()
    worst_in = torch.where(picked, score, torch.inf).amin(1)
    best_out = torch.where(picked, -torch.inf, score).amax(1) if case.T else worst_in
    assert (best_out <= worst_in + 1e-6).all()
    ordered = score.gather(1, indices.long())
    assert (ordered.diff(dim=1) <= 1e-6).all(), "largest first"


def pinned():
    """Forces one plan for every T, since equal bits are only guaranteed within a plan."""
    return plan.override(plan._forced or plan.BACKENDS[BACKEND][0])


def assert_same_bits(got, want):
    """Asserts equal bits, which the kernels guarantee; the reference uses BLAS, which does not."""
    if BACKEND == "reference" and got.is_floating_point():
        assert_accurate("same", got, want.double(), units=12)
    else:
        assert torch.equal(got, want)


@functools.cache
def ids_of(case):
    g = torch.Generator().manual_seed(3)
    return torch.randint(-1, case.E, (case.T, case.K), generator=g, dtype=torch.int32)


def routed_lora(v, case):
    y, routing = routed(v, case)
    outputs = y, routing.weights, routing.logits, routing.mean_prob, routing.lse
    return outputs, lambda v: eager.routed_lora(v, case, routing.indices)


def router_topk(v, case):
    options = {"bias": v["bias"], "router_bias": v["router_bias"], **case.options}
    r = F.router_topk(v["x"], v["router_weight"], case.K, **options)
    rest = case, r.indices
    return (r.weights, r.logits, r.mean_prob, r.lse), lambda v: eager.router_topk(
        v["x"], v["router_weight"], *rest, v["router_bias"]
    )


def from_logits(v, case):
    r = Routing.from_logits(v["logits"], case.K, bias=v["bias"], **case.options)

    def truth(v):
        eye = torch.eye(case.E, dtype=torch.float64)
        return eager.router_topk(v["logits"], eye, case, r.indices)

    return (r.weights, r.logits, r.mean_prob, r.lse), truth


def grouped_lora(v, case):
    routing = Routing.from_ids(ids_of(case), v["weights"], num_experts=case.E)
    rest = {"scaling": v["scaling"], "base": v["base"], **experts_of(case)}
    y = F.grouped_lora(v["x"], v["lora_A"], v["lora_B"], routing, **rest)
    return (y,), lambda v: (
        eager.grouped_lora(
            v["x"],
            v["lora_A"],
            v["lora_B"],
            ids_of(case),
            v["weights"],
            case,
            v["base"],
            v["scaling"],
        ),
    )


def shrink(v, case):
    return F.shrink(v["x"], v["lora_A"], v["router_weight"]), lambda v: (
        v["x"] @ v["lora_A"].T,
        v["x"] @ v["router_weight"].T,
    )


def expand(v, case):
    return (F.expand(v["H"], v["lora_B"], v["base"]),), lambda v: (
        v["H"] @ v["lora_B"] + (0 if v["base"] is None else v["base"]),
    )


FUNCTIONS = [routed_lora, router_topk, from_logits, grouped_lora, shrink, expand]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
USED = {
    routed_lora: PARAMETERS,
    router_topk: ("x", "router_weight", "router_bias"),
    from_logits: ("logits",),
    grouped_lora: ("x", "lora_A", "lora_B", "base", "weights"),
    shrink: ("x", "lora_A", "router_weight"),
    expand: ("H", "lora_B", "base"),
}


def inputs_of(case, dtype):
    v = sample(case, dtype)
    g = torch.Generator().manual_seed(9)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, columns in (("weights", case.K), ("logits", case.E), ("H", case.R)):
        v[name] = torch.randn(case.T, columns, generator=g, dtype=torch.float64).to(wide)
    return v
