"""The CUDA kernels' arguments: strides, gradients that are not needed, large offsets, refused values."""

from __future__ import annotations

import mmap
import shutil
import sys

import pytest
import torch

from ..support import slots
from ..support.cases import BY_NAME, sample
from ..support.cuda_calls import (
    all_needed,
    built,
    cotangents,
    grouped,
    grouped_backward,
    grouped_sample,
    noise,
    routed,
    routed_backward,
    some,
)
from ..support.cuda_shim import build

pytestmark = pytest.mark.skipif(
    shutil.which(build.COMPILER) is None or sys.platform != "linux", reason="needs a C++ compiler"
)


@pytest.mark.parametrize("adapters", [torch.float32, torch.float16, torch.float64], ids=str)
@some("tiles fit", "unequal ranks")
def test_parameters_in_their_own_dtype(kernels, case, adapters):
    """They are rounded to x's dtype for the products; their gradients are returned in their own dtype."""
    inputs = grouped_sample(case, torch.bfloat16, adapter_dtype=adapters)
    rounded = {k: inputs[k].bfloat16() for k in ("lora_A", "lora_B")}
    want = grouped(kernels, inputs | rounded, case, "rank_dense")
    got = grouped(kernels, inputs, case, "rank_dense")
    assert all(map(torch.equal, got, want))
    grads = grouped_backward(kernels, inputs, case, got[1], *all_needed())
    wide = rounded | {k: v.float() for k, v in rounded.items()}
    _, _, *sums = grouped_backward(kernels, inputs | wide, case, got[1], *all_needed())
    for grad, total in zip(grads[2:], sums):
        assert grad.dtype == adapters
        assert torch.equal(grad, total.to(adapters))


def test_rows_may_lie_anywhere(kernels):
    """x, base and dy as slices of wider tensors or expanded: other load widths, the same bits."""
    case = BY_NAME["tiles fit"]
    v = sample(case)
    dy = noise(case.D_out).expand(case.T, -1)
    plain = routed(kernels, v, case, "rank_dense")
    saved, aux = [plain[i] for i in (1, 2, 3, 7)], cotangents(case)
    grads = routed_backward(kernels, v, case, dy.contiguous(), aux, saved, *all_needed())

    def inside(t):
        frame = torch.full((t.shape[0] + 2, t.shape[1] + 5), torch.nan)
        frame[1:-1, 3:-2] = t
        return frame[1:-1, 3:-2]

    v |= {k: inside(v[k]) for k in ("x", "base", "lora_A", "lora_B", "router_weight")}
    aux[2] = aux[2].expand(3, -1)[1]
    again = routed(kernels, v, case, "rank_dense")
    got = routed_backward(kernels, v, case, dy, aux, saved, *all_needed())
    for a, b in zip([*plain, *grads], [*again, *got]):
        assert torch.equal(a, b)


@some("odd", "unequal ranks", "shared A", "wide: unequal")
def test_gradients_that_are_not_needed(kernels, case):
    v = sample(case)
    out = routed(kernels, v, case, "rank_dense")
    saved = [out[i] for i in (1, 2, 3, 7)]
    dy, none = noise(case.T, case.D_out), [None] * 4
    everything = routed_backward(kernels, v, case, dy, none, saved, *all_needed())
    for skipped in range(5):
        needs = [i != skipped for i in range(5)]
        got = routed_backward(kernels, v, case, dy, none, saved, [], *needs, "rank_dense")
        for i, (g, full) in enumerate(zip(got, everything)):
            assert g.shape == (0,) if i == skipped else torch.equal(g, full)
    frozen = [0, case.E - 1]
    _, _, da, db, _ = routed_backward(kernels, v, case, dy, none, saved, *all_needed(frozen))
    for e in range(case.E):
        rows = slice(*case.offsets[e : e + 2])
        assert torch.equal(db[rows], 0 * db[rows] if e in frozen else everything[3][rows])
        if not case.shared_a:
            assert torch.equal(da[rows], 0 * da[rows] if e in frozen else everything[2][rows])


def test_offsets_beyond_int32(kernels):
    """Rows 2^30 elements apart; the memory between them is mapped but never touched."""
    rows, D, stride = 3, 32, 2**30 + 8
    memory = torch.frombuffer(mmap.mmap(-1, 2 * ((rows - 1) * stride + D)), dtype=torch.bfloat16)
    x = memory.as_strided((rows, D), (stride, 1)).copy_(noise(rows, D))
    a, w, h = noise(16, D).bfloat16(), noise(2, D), noise(rows, 16)
    calls = [
        lambda x: kernels.shrink(x, a, w),
        lambda x: [kernels.wgrad(h, x)],
        lambda x: [kernels.expand(h, a, None, None, x, torch.bfloat16)],
    ]
    for call in calls:
        assert all(map(torch.equal, call(x), call(x.contiguous())))


def test_what_is_refused(monkeypatch):
    case = BY_NAME["tiles fit"]
    kernels = built()
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        routed(kernels, sample(case, torch.float64), case, "rank_dense")
    with pytest.raises(ValueError, match=r"plan.*'other'"):
        routed(kernels, sample(case), case, "other")
    for wrong in (["together", "segmented"], ["apart", "decode"]):
        v = slots.inputs_of(case, "apart", torch.float32)
        names = ("x", "lora_A", "lora_B", "base", "ids", "weights", "scaling")
        with pytest.raises(ValueError, match=r"slots"):
            kernels.grouped_lora(*(v[k] for k in names), case.offsets, False, *wrong)
    with pytest.raises(ValueError, match=r"x: expected shape \(128, 128\), got \(64, 128\)"):
        slots.forward(kernels, v, case, "sum")
    wrong = sample(case)
    with pytest.raises(ValueError, match=r"lora_A: expected shape \(64, 128\), got \(64, 127\)"):
        routed(kernels, wrong | {"lora_A": wrong["lora_A"][:, 1:]}, case, "rank_dense")
    monkeypatch.setenv("CUDA_SHIM_CAPABILITY", "7")
    routed(kernels, sample(case, torch.float16), case, "rank_dense")
    with pytest.raises(ValueError, match=r"bfloat16: expected .* 8.0 or newer, got 7"):
        routed(kernels, sample(case, torch.bfloat16), case, "rank_dense")
