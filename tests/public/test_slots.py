"""grouped_lora with one row per slot, in y ("apart") or in x ("sum"), as a black box on every backend.

The reference treats each slot as a separate token: eager.py in fp64 on the same rounded inputs, with
gradients from autograd. The tolerance comes from the same formulation in the tested dtype.
"""

from __future__ import annotations

import pytest
import torch

from lora_moe import Routing
from lora_moe import functional as F

from ..support.cases import BY_NAME, in_double, leaves, some_cases
from ..support.compare import assert_accurate
from ..support.functions import cotangents, every_dtype, experts_of, gradients
from ..support.grouped_slots import NAMES, ids_of, inputs_of, ours, theirs

FORMS = ("apart", "apart, a base per slot", "sum")
every_form = pytest.mark.parametrize("form", FORMS)


@every_dtype
@every_form
@some_cases(
    "odd", "one token", "tiles fit", "one past a tile", "several chunks", "unequal ranks", "shared A",
    "many experts", "one expert", "no rows",
)  # fmt: skip
def test_values_and_gradients(case, form, dtype):
    inputs = inputs_of(case, dtype, form)
    runs = [leaves(v, *NAMES) for v in (inputs, in_double(inputs), inputs)]
    y, *plain = (f(v, case, form) for f, v in zip((ours, theirs, theirs), runs, strict=True))
    assert y.shape == plain[0].shape and y.dtype == dtype
    assert_accurate("y", y, *plain, dtype=dtype)
    dys = [dy.to(dtype).double() for dy in cotangents([y])]  # the same for all three runs
    got, want, usual = (
        gradients([out], dys, v, NAMES) for out, v in zip((y, *plain), runs, strict=True)
    )
    for name in got:
        # with few numbers rounded to 16 bits, either of the two results may be the closer one
        few = 1.5 if dtype.itemsize == 2 and got[name].numel() <= 256 else None
        assert_accurate(f"d{name}", got[name], want[name], usual[name], dtype=dtype, factor=few)


@every_form
def test_no_gradients_same_bits_and_leading_dimensions(form):
    case = BY_NAME["tiles fit"]
    v = inputs_of(case, torch.float32, form)
    y = ours(leaves(v, *NAMES), case, form)
    with torch.no_grad():
        assert torch.equal(ours(v, case, form), y)
        x, base = (v[k].unflatten(0, (8, 8)) for k in ("x", "base"))
        assert torch.equal(ours(v | {"x": x, "base": base}, case, form), y.unflatten(0, (8, 8)))


@every_form
def test_non_contiguous_operands(form):
    """x, base and the gradient of y as slices, transposed or expanded."""
    case = BY_NAME["unequal ranks"]
    inputs = inputs_of(case, torch.float32, form)
    inputs |= {k: v.double().float() for k, v in inputs.items() if k in ("x", "base")}
    spread = {k: torch.stack([v := inputs[k], v + 1], -1)[..., 0] for k in ("x", "base")}
    got, want = leaves(inputs, *NAMES), leaves(in_double(inputs), *NAMES)
    for k, v in spread.items():
        got[k] = v.requires_grad_()
        assert not v.is_contiguous()
    y, truth = ours(got, case, form), theirs(want, case, form)
    dy = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(0)).expand(y.shape)
    grads = (
        torch.autograd.grad(out, [v[k] for k in NAMES], dy.to(out.dtype))
        for out, v in ((y, got), (truth, want))
    )
    for name, a, b in zip(NAMES, *grads, strict=True):
        assert_accurate(f"d{name}", a, b, units=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_empty_slot_is_its_base_bit_for_bit(dtype):
    case = BY_NAME["odd"]
    for form in FORMS:
        v = inputs_of(case, dtype, form)
        v["base"][0, ..., 0] = torch.nan
        y, empty = ours(v, case, form), ids_of(case) < 0
        base = v["base"][:, None].expand(y.shape) if form == "apart" else v["base"]
        at = empty.all(1) if form == "sum" else empty
        assert at.any() and torch.equal(y[at].nan_to_num(9), base[at].nan_to_num(9))
        nothing = ours(v | {"base": None}, case, form)
        assert not nothing[at].any() and nothing[~at].any()


@every_form
@some_cases("odd", "no rows")
def test_no_slots_at_all(case, form):
    v = leaves(inputs_of(case, torch.float32, form), *NAMES)
    v["weights"] = torch.zeros(case.T, 0, requires_grad=True)
    for name in ("x", "base"):
        if v[name].dim() == 3:
            v[name] = v[name][:, :0].detach().requires_grad_()
    y = ours(v, case, form, torch.zeros(case.T, 0, dtype=torch.int32))
    y.sum().backward()
    assert y.shape == ((case.T,) if form == "sum" else (case.T, 0)) + (case.D_out,)
    if form == "sum":
        assert torch.equal(y, v["base"])
    assert all(v[k].grad is not None and not v[k].grad.any() for k in ("lora_A", "lora_B"))


@every_form
def test_frozen_experts_get_exact_zeros(form):
    case = BY_NAME["unequal ranks"]
    inputs = inputs_of(case, torch.float32, form)
    grads = []
    for frozen in ((), (2,)):
        v = leaves(inputs, *NAMES)
        ours(v, case, form, frozen=frozen).square().sum().backward()
        grads.append(v)
    rows = slice(*case.offsets[2:4])
    free, held = grads
    for name in ("lora_A", "lora_B"):
        assert free[name].grad[rows].any() and not held[name].grad[rows].any()
        held[name].grad[rows] = free[name].grad[rows]
    assert all(torch.equal(free[k].grad, held[k].grad) for k in NAMES)


def test_the_rows_of_x_are_not_copied():
    """Neither pass copies a row of x, or of a base shared by tokens, for each of the eight slots."""
    T, K, D = 64, 8, 4096
    g = torch.Generator().manual_seed(0)
    x, base = (torch.randn(T, n, generator=g) for n in (D, 16))
    A, B = torch.randn(K, D, generator=g), torch.randn(K, 16, generator=g)
    for t in (x, A, B):
        t.requires_grad_()
    saved = []
    routing = Routing.from_gates(torch.ones(T, K))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = F.grouped_lora(x, A, B, routing, rank_offsets=1, base=base, slots="apart")
    assert y.shape == (T, K, 16) and max(t.numel() for t in saved) == x.numel()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"slots": "together"}, "slots: expected 'apart', 'sum' or None, got 'together'"),
        (
            {"slots": "sum"},
            r"x: expected \(..., K, D_in\) with slots='sum' and K = 2, got \(7, 15\)",
        ),
        ({"base": torch.zeros(7, 3, 17)}, r"base: expected \(7, 2, 17\)"),
        ({"base": torch.zeros(6, 17)}, r"base: expected \(7, 17\)"),
        ({"ids": torch.zeros(6, 2, dtype=torch.int32)}, r"routing.indices: expected \(7, 2\)"),
        ({"ids": torch.full((7, 2), 3)}, r"expected expert ids in \[-1, 3\), got 3"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_raises(change, message):
    case = BY_NAME["odd"]
    v = inputs_of(case, torch.float32, "apart") | change
    ids = v.get("ids", ids_of(case))
    weights = torch.ones(ids.shape)
    with pytest.raises(ValueError, match=message):
        F.grouped_lora(
            v["x"], v["lora_A"], v["lora_B"], Routing.from_ids(ids, weights, num_experts=case.E),
            scaling=v["scaling"], base=v["base"], slots=v.get("slots", "apart"), **experts_of(case),
        )  # fmt: skip
