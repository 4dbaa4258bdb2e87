"""Checks outputs and gradients of this process's backend against fp64.

The truth is the formula of reference.py in fp64 on the same rounded inputs, with gradients from PyTorch's
autograd, so it is independent of our backward.  An error is ||out - truth|| / ||truth|| in units of
the dtype's u: for 16 bit about 0.5 in kernels that sum in fp32 and round once, hundreds in wrong ones.

Run as a module, it prints one line of JSON per check; `lora-moe doctor` does so for every backend.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from itertools import accumulate

import torch

from . import Routing, reference
from . import functional as F
from .backend import BackendUnavailable

T, D_IN, D_OUT, E, K = 33, 256, 192, 5, 2
CHECKS = {  # ranks, shared_a, and (gate, renormalize) unless the caller gives the routing
    "softmax router": ((8, 16, 8, 4, 12), False, ("softmax", True)),
    "sigmoid router": ((8,) * E, False, ("sigmoid", False)),
    "shared A": ((8,) * E, True, ("softmax", True)),
    "given routing": ((8, 16, 8, 4, 12), False, None),
}
LIMITS = {torch.float64: 500.0, torch.float32: 16.0, torch.bfloat16: 1.0, torch.float16: 1.0}  # u


def run(device: str, dtypes) -> Iterator[tuple]:
    """Yield per check: name, dtype, largest error of an output, largest error of a gradient, limit."""
    for dtype in dtypes:
        for name, check in CHECKS.items():
            inputs = sample(check, dtype)
            ours = differentiate(public_function, check, [t.to(device) for t in inputs], dtype)
            truth = differentiate(formula, check, [t.double() for t in inputs], dtype)
            errors = [max(map(relative_error, *pair)) for pair in zip(ours, truth, strict=True)]
            u = torch.finfo(dtype).eps / 2
            yield name, str(dtype).removeprefix("torch."), *(e / u for e in errors), LIMITS[dtype]


def relative_error(out, truth) -> float:
    out, truth = out.detach().cpu().double(), truth.detach()
    error = float((out - truth).norm() / truth.norm())
    return math.inf if math.isnan(error) else error


def sample(check, dtype) -> list[torch.Tensor]:
    """x, router, A, B, base and router_bias from a fixed seed; outputs and gradients have size 1."""
    ranks, shared_a, _ = check
    generator = torch.Generator().manual_seed(0)

    def normal(rows, columns, scale=1.0):
        values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return (values * scale).to(dtype)

    rows_of_a = ranks[0] if shared_a else sum(ranks)
    x, base = normal(T, D_IN), normal(T, D_OUT)
    router, a = normal(E, D_IN, D_IN**-0.5), normal(rows_of_a, D_IN, D_IN**-0.5)
    return [x, router, a, normal(sum(ranks), D_OUT, 0.5), base, normal(1, E, 0.5)[0]]


def differentiate(function, check, inputs, dtype) -> tuple[list, list]:
    """Outputs, and gradients of all inputs that they depend on."""
    inputs = [t.requires_grad_() for t in inputs]
    outputs = function(check, *inputs)
    weights = [torch.arange(1.0, o.numel() + 1).sin().view(o.shape).to(dtype) for o in outputs]
    loss = sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    return outputs, [g for g in gradients if g is not None]


def given_routing(like):
    """A token with no expert, an expert with no token, empty slots, an expert picked twice."""
    token = torch.arange(T, device=like.device)
    ids = torch.stack([token % (E - 1), token * 3 % (E - 1)], 1)  # (T, K)
    ids[::7, 1] = -1
    ids[1] = -1
    return ids.int(), (1 + ids.to(like)) / 8  # exact in every dtype


def public_function(check, x, w, a, b, base, router_bias):
    ranks, shared_a, router = check
    experts = {"rank_offsets": [0, *accumulate(ranks)], "shared_a": shared_a, "scaling": 0.5}
    if router is None:
        routing = Routing.from_ids(*given_routing(x.float()), num_experts=E)
        return [F.grouped_lora(x, a, b, routing, base=base, **experts)]
    gate, renormalize = router
    y, routing = F.routed_lora(
        x, w, a, b, K, base=base, gate=gate, renormalize=renormalize, router_bias=router_bias,
        **experts,
    )  # fmt: skip
    return [y, routing.weights, routing.mean_prob, routing.lse]


def formula(check, x, w, a, b, base, router_bias):
    ranks, shared_a, router = check
    experts = x.new_full((E,), 0.5), [0, *accumulate(ranks)], shared_a
    if router is None:
        return [reference.grouped_lora(x, a, b, base, *given_routing(x), *experts)[0]]
    y, _, weights, _, mean_prob, lse, *_ = reference.routed_lora(
        x, w, a, b, base, None, router_bias, *experts, K, *router
    )
    return [y, weights, mean_prob, lse]


if __name__ == "__main__":
    on_gpu = os.environ.get("LORA_MOE_BACKEND") in ("triton", "cuda")
    if os.environ.get("LORA_MOE_BACKEND") == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable("there is no CUDA device")
    device = "cuda" if on_gpu and torch.cuda.is_available() else "cpu"
    for result in run(device, list(LIMITS)[1 if on_gpu else 0 :]):  # no fp64 in GPU kernels
        print(json.dumps(result), flush=True)
