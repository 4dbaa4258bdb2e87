"""The Triton kernels' arguments: strides, gradients not needed, extreme sizes, refused values."""

from __future__ import annotations

import importlib
import mmap
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from lora_moe import reference
from lora_moe.plan import PLANS

from ..support.cases import BY_NAME, Case, in_double, sample
from ..support.interpreter import overflow_checked
from ..support.triton_calls import (
    DEVICE,
    INTERPRETED,
    ROUTING,
    all_needed,
    compare,
    cotangents,
    experts,
    kernels,
    noise,
    on_device,
    routed,
    routed_backward,
    router,
    saved_as,
    some,
    watched,
)

pytest.importorskip("triton")


@pytest.mark.parametrize("T", [7, 40, 70])
def test_rows_may_lie_anywhere(T):
    """x, base and dy as slices of wider tensors or expanded; transposed parameters."""
    case = replace(BY_NAME["tiles fit"], T=T)
    v = on_device(sample(case, torch.float32))
    dy = noise(case.D_out).to(DEVICE).expand(T, -1)
    saved = [routed(kernels, v, case, "rank_dense")[i] for i in (1, 2, 3, 7)]
    plain = routed(kernels, v, case, "rank_dense")
    aux = [a.to(DEVICE) for a in cotangents(case)]
    grads = routed_backward(kernels, v, case, dy.contiguous(), aux, saved, *all_needed())

    def inside(t):
        frame = torch.full((t.shape[0] + 2, t.shape[1] + 5), torch.nan, device=DEVICE)
        frame[1:-1, 3:-2] = t
        return frame[1:-1, 3:-2]

    v |= {k: inside(v[k]) for k in ("x", "base", "lora_A")}
    v["lora_B"] = v["lora_B"].T.contiguous().T
    aux[2] = aux[2][:1].expand(case.E)
    with watched():
        again = routed(kernels, v, case, "rank_dense")
        got = routed_backward(
            kernels, v, case, dy, aux[:2] + [None] + aux[3:], saved, *all_needed()
        )
    for a, b in zip(plain, again):
        assert torch.equal(a, b)
    assert torch.equal(got[3], grads[3])  # dB does not depend on the router


@some("odd", "unequal ranks", "shared A", "wide: unequal")
def test_gradients_that_are_not_needed(case):
    v = on_device(sample(case))
    out = routed(kernels, v, case, "rank_dense")
    saved = [out[i] for i in (1, 2, 3, 7)]
    dy = noise(case.T, case.D_out).to(DEVICE)
    none = [None] * 4
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
        grads = [(db, everything[3])] + [(da, everything[2])] * (not case.shared_a)
        for got, full in grads:
            if e in frozen:
                assert not got[rows].any()
            else:  # frozen rows are skipped, so tiles and sums may differ
                torch.testing.assert_close(got[rows], full[rows])


def test_offsets_beyond_int32():
    """Rows 2^30 elements apart; the memory between them is mapped but never touched."""
    if not INTERPRETED:
        pytest.skip("needs 13 GB of GPU memory")
    rows, D, stride = 3, 32, 2**30 + 8
    memory = torch.frombuffer(mmap.mmap(-1, 2 * ((rows - 1) * stride + D)), dtype=torch.bfloat16)
    x = memory.as_strided((rows, D), (stride, 1)).copy_(noise(rows, D))
    a, w = noise(16, D).bfloat16(), noise(2, D)
    with overflow_checked():
        got = kernels.shrink(x, a, w)
        wgrad = kernels.wgrad(noise(rows, 4), x)
        y = kernels.expand(noise(rows, 16), a, None, None, x, torch.bfloat16)
    for g, want in zip(got, kernels.shrink(x.contiguous(), a, w)):
        assert torch.equal(g, want)
    assert torch.equal(wgrad, kernels.wgrad(noise(rows, 4), x.contiguous()))
    want = kernels.expand(noise(rows, 16), a, None, None, x.contiguous(), torch.bfloat16)
    assert torch.equal(y, want)


def test_fp64_is_refused():
    case = BY_NAME["odd"]
    v = on_device(sample(case, torch.float64))
    with pytest.raises(TypeError, match="float64"):
        routed(kernels, v, case, "rank_dense")
    with pytest.raises(TypeError, match="float64"):
        kernels.wgrad(v["x"], v["x"])


def test_import_under_the_bare_name_is_refused():
    """Another project owns that name, and other packages probe for it."""
    code = "import sys; sys.path.insert(0, '.'); import triton_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: import lora_moe.triton_kernels" in done.stderr


def test_ranks_from_1_to_1024():
    """One expert of each rank, with any padding."""
    for rank in (1, 2, 3, 7, 12, 17, 24, 64, 127, 257, 1024):
        case = Case("", 5, 2, 1, (rank, 1), 17, 16)
        assert case.offsets == [0, *accumulate((rank, 1))]
        inputs = sample(case)
        with watched():
            got = routed(kernels, on_device(inputs), case, "rank_dense")
        want = routed(reference, in_double(inputs), case)
        compare(["y", *ROUTING, "S"], got, want, torch.float32)


def test_a_tile_that_does_not_fit_is_tried_without_a_pipeline():
    from triton.runtime.errors import OutOfResources

    launching = importlib.import_module("lora_moe.triton_kernels.launching")
    tried = []

    class Kernel:
        def __init__(self, fits):
            self.fits = fits

        def __getitem__(self, grid):
            def run(*args, **options):
                tried.append(options["num_stages"])
                if options["num_stages"] > self.fits:
                    raise OutOfResources(200, 100, "shared memory")

            return run

    x = torch.zeros(1, device=DEVICE)
    launching.launch(x, Kernel(1), (1,), x, num_stages=3)
    assert tried == [3, 1]
    with pytest.raises(OutOfResources):
        launching.launch(x, Kernel(0), (1,), x, num_stages=3)


@pytest.mark.parametrize("plan", PLANS)
def test_what_does_not_fit_at_all_is_served_by_the_reference(plan):
    """With the S of every plan; a single warning names the operator."""
    from triton.runtime.errors import OutOfResources

    from lora_moe import backend

    def too_large(*args):
        raise OutOfResources(200, 100, "shared memory")

    case = BY_NAME["unequal ranks"]
    v = sample(case)
    run = backend._or_reference("routed_lora", too_large, OutOfResources)
    args = [
        v[k]
        for k in (
            "x",
            "router_weight",
            "lora_A",
            "lora_B",
            "base",
            "bias",
            "router_bias",
            "scaling",
        )
    ]
    with pytest.warns(RuntimeWarning, match="routed_lora does not fit this GPU"):
        got = run(*args, *experts(case), *router(case), plan)
    want = list(routed(reference, v, case))
    want[7] = saved_as(plan, want[7], want[1], case)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
