"""Calls of the CUDA kernels, compiled for the CPU without a GPU, and their comparison with fp64."""

from __future__ import annotations

import functools
import math
import os

import pytest
import torch

from . import slots
from .cases import BY_NAME, Case, sample
from .cuda_shim import build

WIDE = [  # more ranks or experts than a block's registers hold
    Case("wide: 160 ranks", 40, 10, 2, 16, 72, 33),
    Case("wide: 1024 ranks", 20, 64, 2, 16, 40, 33),
    Case("wide: unequal", 18, 8, 2, (64, 1, 3, 7, 1, 2, 1, 190), 40, 33, gate="sigmoid"),
    Case("wide: shared A", 17, 64, 3, 8, 33, 40, shared_a=True),
    Case("wide: dense", 5, 257, 257, 1, 17, 16, renormalize=False),
    Case("wide: 600 experts", 3, 600, 2, (2, *[1] * 599), 16, 17),
]
DROPS = {"all": (math.inf, 0.0), "top_p": (0.6, 0.0), "threshold": (math.inf, 0.25)}


def some(*names):
    cases = [BY_NAME[n] if n in BY_NAME else {c.name: c for c in WIDE}[n] for n in names]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@functools.cache
def built():
    return build.Kernels(build.build(sanitize="LORA_MOE_SHIM_SANITIZE" in os.environ))


def noise(*shape, seed=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype)


def router(case, drop="all"):
    return case.K, case.gate, case.renormalize, *DROPS[drop]


def routed(ops, v, case, *plan, drop="all"):
    return ops.routed_lora(
        v["x"], v["router_weight"], v["lora_A"], v["lora_B"], v["base"], v["bias"],
        v["router_bias"], v["scaling"],
        case.offsets, case.shared_a, *router(case, drop), *plan,
    )  # fmt: skip


def routed_backward(ops, v, case, dy, aux, saved, *needs):
    """routed_lora_backward with the gradient of router_bias, which the kernel's `needs` do not include."""
    ids, weights, logits, s = saved
    if len(needs) == 6:
        needs = (*needs[:5], True, needs[5])
    return ops.routed_lora_backward(
        dy, *aux, v["x"], v["router_weight"], v["lora_A"], v["lora_B"], s, ids, weights, logits,
        v["scaling"], case.offsets, case.shared_a, case.gate, case.renormalize, *needs,
    )  # fmt: skip


def all_needed(frozen=(), chosen="rank_dense"):
    return list(frozen), True, True, True, True, chosen


def cotangents(case):
    """Incoming gradients of weights, logits, mean_prob, lse."""
    T, E = case.T, case.E
    shapes = (T, case.K), (T, E), (E,), (T,)
    return [noise(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def nasty_routing(case):
    """(ids, weights) with empty slots, ids out of range, repeated ids, negative and zero weights."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, case.E, (case.T, case.K), generator=g, dtype=torch.int32)
    ids[: case.T // 2, -1] = ids[: case.T // 2, 0]
    ids[case.T // 2 : case.T // 2 + 1] = torch.iinfo(torch.int32).min
    ids[:1] = case.E
    weights = noise(case.T, case.K, seed=4)
    weights[-1:] = 0
    return ids, weights


def grouped(ops, v, case, *plan):
    return ops.grouped_lora(
        v["x"], v["lora_A"], v["lora_B"], v["base"], v["ids"], v["weights"], v["scaling"],
        case.offsets, case.shared_a, *slots.none(ops), *plan,
    )  # fmt: skip


def grouped_backward(ops, v, case, s, *rest):
    return ops.grouped_lora_backward(
        v["dy"], v["x"], v["lora_A"], v["lora_B"], s, v["ids"], v["weights"], v["scaling"],
        case.offsets, case.shared_a, *slots.none(ops), *rest,
    )  # fmt: skip


def grouped_sample(case, dtype, **more):
    ids, weights = nasty_routing(case)
    dy = noise(case.T, case.D_out, dtype=dtype)
    return sample(case, dtype, **more) | {"ids": ids, "weights": weights, "dy": dy}
