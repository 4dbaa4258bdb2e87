"""Slots kept apart and slots summed: inputs, the formula in fp64 by expert, and its gradients.

Kernel tests compare a backend's operators with these, forward and backward.

Letters: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lora_moe import reference

from .cases import BY_NAME, Case, in_double, sample
from .compare import assert_accurate

FORMS = ("apart", "apart, a base per slot", "sum")
UNITS = {torch.float32: 16, torch.bfloat16: 0.85, torch.float16: 0.85}
NAMES = ("y", "S", "dx", "dweights", "da", "db")
LEAVES = ("x", "weights", "lora_A", "lora_B")

CASES = [
    BY_NAME["odd"],
    BY_NAME["unequal ranks"],
    BY_NAME["no rows"],
    BY_NAME["one takes all"],  # K = 1
    Case("one token", 1, 8, 2, 8, 40, 72),
    Case("three slots", 43, 5, 3, 17, 70, 40, with_base=False),
    Case("many experts", 12, 20, 4, 3, 33, 24),
    Case("two windows", 140, 3, 2, 4, 20, 24),  # of the interpreted sort
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_form = pytest.mark.parametrize("form", FORMS)
every_call = pytest.mark.parametrize(  # fp16 differs from bf16 in nothing that these kernels do
    ("case", "dtype", "form"),
    [
        (case, dtype, form)
        for case in CASES
        for dtype in DTYPES
        for form in FORMS
        if dtype != torch.float16 or case.name == "unequal ranks"
        if form in ("apart", "sum") or (dtype == torch.bfloat16 and case.with_base)
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)


def none(operators):
    """Arguments of operators without slots; the reference has separate functions instead."""
    return () if operators is reference else ("none",)


def routing_of(case):
    """(ids, weights) with empty slots and tokens, invalid and repeated ids, negative and zero weights."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, case.E, (case.T, case.K), generator=g, dtype=torch.int32)
    ids[: case.T // 2, -1] = ids[: case.T // 2, 0]
    ids[case.T // 2 : case.T // 2 + 1] = -1
    ids[case.T // 3 : case.T // 3 + 1, -1:] = case.E
    weights = torch.randn(case.T, case.K, generator=g)
    weights[-1:, :1] = 0
    return ids, weights


def inputs_of(case, form, dtype, adapter_dtype=None):
    """{name: operand} as the operators take them, with 2-D rows, and dy."""
    by_slot = replace(case, T=case.T * case.K)
    v, wide = (sample(c, dtype, adapter_dtype=adapter_dtype) for c in (case, by_slot))
    v["ids"], v["weights"] = routing_of(case)
    if form == "sum":
        v["x"] = wide["x"]
    elif form != "apart":
        v["base"] = wide["base"]
    rows = case.T * (1 if form == "sum" else case.K)
    v["dy"] = torch.randn(rows, case.D_out, generator=torch.Generator().manual_seed(5)).to(dtype)
    return v


def formula(v, case, form):
    """(y, S by slot (T, K r)), computed expert by expert; differentiable."""
    T, K = v["ids"].shape
    x = v["x"].view(T, K, -1) if form == "sum" and T else v["x"][:, None].expand(T, K, -1)
    r = max(b - a for a, b in pairwise(case.offsets))
    y, s = x.new_zeros(T, K, case.D_out), x.new_zeros(T, K, r)
    for e, scale in enumerate(v["scaling"]):
        rows = slice(*case.offsets[e : e + 2])
        mine = (v["ids"] == e)[..., None]
        s_e = x @ v["lora_A"][rows].T
        s = s + torch.nn.functional.pad(s_e * mine, (0, r - s_e.shape[-1]))
        y = y + torch.where(mine, v["weights"][..., None] * scale * (s_e @ v["lora_B"][rows]), 0)
    y = y.sum(1) if form == "sum" else y.flatten(0, 1)
    if v["base"] is not None:
        y = y + v["base"].repeat_interleave(len(y) // max(1, len(v["base"])), 0)
    return y, s.flatten(1)


def forward(operators, v, case, form):
    """(y, S)"""
    return operators.grouped_lora(
        *(v[name] for name in ("x", "lora_A", "lora_B", "base", "ids", "weights", "scaling")),
        *(case.offsets, False, form.partition(",")[0], "segmented"),
    )


def backward(operators, v, case, form, s, frozen=(), needs=(True,) * 4):
    """(dx, dweights, da, db)"""
    return operators.grouped_lora_backward(
        *(v["dy"], v["x"], v["lora_A"], v["lora_B"], s, v["ids"], v["weights"], v["scaling"]),
        *(case.offsets, False, form.partition(",")[0], list(frozen), *needs, "segmented"),
    )


def results(operators, v, case, form):
    y, s = forward(operators, v, case, form)
    return y, s, *backward(operators, v, case, form, s)


def truth(v, case, form):
    """(y, S, gradients...) in fp64 by autograd."""
    exact = in_double(v)
    leaves = {name: exact[name].clone().requires_grad_() for name in LEAVES}
    y, s = formula(exact | leaves, case, form)
    return y.detach(), s.detach(), *torch.autograd.grad(y, leaves.values(), exact["dy"])


def compare(got, v, case, form, dtype):
    """Asserts that the results match the formula with the accuracy of the dtype."""
    for name, g, want in zip(NAMES, got, truth(v, case, form), strict=True):
        assert g.shape == want.shape, name
        kind = torch.float32 if name in ("S", "dweights") else dtype
        # if few numbers are rounded to 16 bits, errors vary by chance
        few = kind != torch.float32 and (g.numel() <= 256 or case.T < 16)
        assert_accurate(name, g.cpu(), want, dtype=kind, units=UNITS[kind] * (1.5 if few else 1))


def check(operators, case, form, dtype, device="cpu"):
    """Checks forward and all gradients."""
    v = inputs_of(case, form, dtype)
    compare(results(operators, on(v, device), case, form), v, case, form, dtype)


def on(v, device):
    return {k: t.to(device) if isinstance(t, torch.Tensor) else t for k, t in v.items()}


def check_layouts(operators, form, device="cpu"):
    """Slices of wider tensors and expanded rows give the same bits as contiguous ones."""
    case = Case("", 18, 4, 2, 16, 72, 40)
    v = on(inputs_of(case, form, torch.float32), device)
    v["dy"] = v["dy"][:1].expand_as(v["dy"])
    plain = results(operators, {k: dense(t) for k, t in v.items()}, case, form)
    for name in ("x", "base", "lora_A", "lora_B"):
        frame = v[name].new_full((len(v[name]) + 2, v[name].shape[1] + 5), torch.nan)
        frame[1:-1, 3:-2] = v[name]
        v[name] = frame[1:-1, 3:-2]
    assert all(map(torch.equal, results(operators, v, case, form), plain))


def dense(t):
    return t.contiguous() if isinstance(t, torch.Tensor) else t


def check_needs(operators, form, device="cpu"):
    """Gradients that are not needed are empty, those of frozen rows zero; all others keep their bits."""
    case = BY_NAME["unequal ranks"]
    v = on(inputs_of(case, form, torch.bfloat16), device)
    _, s, *full = results(operators, v, case, form)
    for skipped in range(4):
        needs = [i != skipped for i in (0, 1, 2, 3)]
        for i, g in enumerate(backward(operators, v, case, form, s, needs=needs)):
            assert g.shape == (0,) if i == skipped else torch.equal(g, full[i])
    rows = slice(*case.offsets[2:4])
    assert all(g[rows].any() for g in full[2:])
    for g in full[2:]:
        g[rows] = 0
    assert all(map(torch.equal, backward(operators, v, case, form, s, frozen=[2]), full))


def check_empty(operators, form, device="cpu"):
    """An empty slot returns its base bit for bit, including NaN, or zeros without a base."""
    case = BY_NAME["odd"]
    v = on(inputs_of(case, form, torch.bfloat16), device)
    v["ids"] = torch.where(v["ids"] % 2 == 0, -1, v["ids"])
    v["base"][:, 0], v["base"][:, 1] = torch.nan, -0.0
    empty = ((v["ids"] < 0) | (v["ids"] >= case.E)).cpu()
    empty = empty.all(1) if form == "sum" else empty.flatten()
    assert 0 < empty.sum() < len(empty)
    y = forward(operators, v, case, form)[0].cpu()
    base = v["base"].repeat_interleave(len(y) // len(v["base"]), 0).cpu()
    assert torch.equal(y[empty].nan_to_num(9), base[empty].nan_to_num(9))
    y, *_, dweights, _, _ = results(operators, v | {"base": None}, case, form)
    assert not y.cpu()[empty].any() and not dweights[v["ids"] < 0].any()
