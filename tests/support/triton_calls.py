"""Calls of the Triton kernels, compiled on a GPU and otherwise interpreted; their comparison with fp64."""

from __future__ import annotations

import contextlib
import importlib
import math

import pytest
import torch

from lora_moe import reference

from .cases import BY_NAME, Case, in_double, sample
from .compare import assert_accurate
from .interpreter import Sanitizer, interpreting

pytest.importorskip("triton")
INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
with interpreting() if INTERPRETED else contextlib.nullcontext():
    kernels = importlib.import_module("lora_moe.triton_kernels")
    router_file = importlib.import_module("lora_moe.triton_kernels.router_topk")

WIDE = [  # more ranks or experts than a program's registers hold
    Case("wide: 1024 ranks", 20, 64, 2, 16, 40, 33),
    Case("wide: unequal", 18, 8, 2, (64, 1, 3, 7, 1, 2, 1, 1), 40, 33, gate="sigmoid"),
    Case("wide: shared A", 17, 64, 3, 8, 33, 40, shared_a=True),
    Case("wide: dense", 5, 257, 257, 1, 17, 16, renormalize=False),
    Case("wide: one rank of 300", 17, 2, 2, (300, 5), 33, 16),
]
# in units of the dtype: 16-bit results carry one rounding of H or dS and one of the output
UNITS = {torch.float32: 12, torch.bfloat16: 0.85, torch.float16: 0.85}
ROUTING = ["indices", "weights", "logits", "mean_prob", "lse", "counts"]


def some(*names):
    cases = [BY_NAME[n] if n in BY_NAME else {c.name: c for c in WIDE}[n] for n in names]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def watched():
    return Sanitizer() if INTERPRETED else contextlib.nullcontext()


def on_device(inputs):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def host(outputs):
    return [v.cpu() for v in outputs]


def in_fp64(values):
    return [v.double() if v is not None and v.is_floating_point() else v for v in values]


def compare(names, got, want, dtype, tokens=16):
    """Compares integers exactly, the router's outputs as fp32, all others with the accuracy of the dtype.

    If few numbers are rounded, such as H for few tokens, errors vary by chance.
    """
    for name, g, w in zip(names, host(got), want, strict=True):
        assert g.shape == w.shape, name
        if not w.is_floating_point():
            assert torch.equal(g.long(), w.long()), name
        else:
            wide = name in ROUTING or name in ("S", "dweights", "dw", "drouter_bias")
            kind = torch.float32 if wide else dtype
            few = g.numel() <= 256 or tokens < 16
            units = 16 if wide else UNITS[kind] * (1.5 if few else 1)
            if name == "drouter_bias":  # E numbers, in which terms of both signs cancel
                units = 32
            assert_accurate(name, g, w, dtype=kind, units=units)


def noise(*shape, seed=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype)


def experts(case):
    return case.offsets, case.shared_a


def router(case):
    return case.K, case.gate, case.renormalize, math.inf, 0.0


def routed(ops, v, case, *plan):
    return ops.routed_lora(
        v["x"], v["router_weight"], v["lora_A"], v["lora_B"], v["base"], v["bias"],
        v["router_bias"], v["scaling"],
        *experts(case), *router(case), *plan,
    )  # fmt: skip


def routed_backward(ops, v, case, dy, aux, saved, *needs):
    """routed_lora_backward with the gradient of router_bias, which the kernel's `needs` do not include."""
    ids, weights, logits, s = saved
    if len(needs) == 6:
        needs = (*needs[:5], True, needs[5])
    return ops.routed_lora_backward(
        dy, *aux, v["x"], v["router_weight"], v["lora_A"], v["lora_B"], s, ids, weights, logits,
        v["scaling"], *experts(case), case.gate, case.renormalize, *needs,
    )  # fmt: skip


def all_needed(frozen=(), plan="rank_dense"):
    return list(frozen), True, True, True, True, plan


def saved_as(plan, s, ids, case):
    """The reference's S in the layout that a plan saves."""
    by_slot = plan == "segmented" and not case.shared_a
    return reference.slots_of_rows(s, ids, case.offsets) if by_slot else s


def check_routed_lora(case, dtype, plan):
    inputs = sample(case, dtype)
    with watched():
        got = routed(kernels, on_device(inputs), case, plan)
    want = list(routed(reference, in_double(inputs), case))
    s, ids = want[7], want[1]
    want[7] = saved_as(plan, s, ids, case)
    compare(["y", *ROUTING, "S"], got, want, dtype)

    dy, aux = noise(case.T, case.D_out, dtype=dtype), cotangents(case)
    given = [ids, want[2].float(), want[3].float(), want[7].float()]
    with watched():
        got = routed_backward(
            kernels, on_device(inputs), case, dy.to(DEVICE), [a.to(DEVICE) for a in aux],
            [v.to(DEVICE) for v in given], *all_needed(plan=plan),
        )  # fmt: skip
    given[3] = s.float()
    want = routed_backward(
        reference, in_double(inputs), case, dy.double(), in_fp64(aux), in_fp64(given)
    )
    compare(["dx", "dw", "da", "db", "drouter_bias"], got, want, dtype, case.T)


def cotangents(case):
    """Incoming gradients of weights, logits, mean_prob, lse."""
    T, E = case.T, case.E
    shapes = (T, case.K), (T, E), (E,), (T,)
    return [noise(*shape, seed=seed) for seed, shape in enumerate(shapes)]
