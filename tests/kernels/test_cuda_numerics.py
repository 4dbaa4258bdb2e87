"""The CUDA kernels bit by bit: fp32 on tensor cores, inf and NaN, ties, order, batches."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import pytest
import torch

from lora_moe import reference

from ..support.cases import BY_NAME, sample
from ..support.cuda_calls import (
    DROPS,
    WIDE,
    all_needed,
    built,
    cotangents,
    grouped,
    grouped_backward,
    noise,
    routed,
    routed_backward,
    some,
)
from ..support.cuda_shim import build

pytestmark = pytest.mark.skipif(
    shutil.which(build.COMPILER) is None or sys.platform != "linux", reason="needs a C++ compiler"
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_fp32_operand_keeps_its_bits(kernels, dtype):
    """The other operand is a 16-bit identity, so each sum has one term; terms differ by up to 2^15."""
    one = torch.eye(70, dtype=dtype)
    h = torch.ldexp(noise(70, 33).frexp().mantissa, torch.arange(70 * 33).view(70, 33) % 15)
    assert torch.equal(kernels.wgrad(h, one), h.T)
    _, logits = kernels.shrink(one, one, h.T.contiguous())
    assert torch.equal(logits, h)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("power", [-90, -24, 16, 90])
def test_fp32_operands_of_any_size(kernels, power, dtype):
    """As with loss scaling: an operand times 2^power gives the result times 2^power, bit for bit."""
    x, h, w, b = noise(70, 40, dtype=dtype), noise(70, 33), noise(33, 40), noise(33, 72)
    some = torch.where(torch.arange(33) % 3 == 0, 1.0, 2.0**power)
    assert torch.equal(kernels.wgrad(h * some, x), kernels.wgrad(h, x) * some[:, None])
    scaled, plain = (kernels.shrink(x, x, v)[1] for v in (w * some[:, None], w))
    assert torch.equal(scaled, plain * some)
    scaled, plain = (
        kernels.expand(h * s, b / s, None, None, None, dtype) for s in (2.0**power, 1.0)
    )
    assert torch.equal(scaled, plain)

    case, v = BY_NAME["tiles fit"], sample(BY_NAME["tiles fit"], dtype)
    out = routed(kernels, v, case, "rank_dense")
    saved, no_dy = [out[i] for i in (1, 2, 3, 7)], torch.zeros(case.T, case.D_out, dtype=dtype)
    plain, scaled = (
        routed_backward(
            kernels, v, case, no_dy, [a * s for a in cotangents(case)], saved, *all_needed()
        )[1]
        for s in (1.0, 2.0**power)
    )
    assert torch.equal(scaled, plain * 2.0**power)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_non_finite_values_stay_in_their_row(kernels, value, dtype):
    """Their row of the result is not finite; all other rows keep their bits."""
    x, h, b = noise(70, 40, dtype=dtype), noise(70, 33), noise(33, 72)
    wrong = h.clone()
    wrong[60, 5] = value
    got, want = kernels.wgrad(wrong, x), kernels.wgrad(h, x)
    assert not got[5].isfinite().any()
    assert torch.equal(got[torch.arange(33) != 5], want[torch.arange(33) != 5])
    got, want = (kernels.expand(v, b, None, None, None, dtype) for v in (wrong, h))
    assert not got[60].isfinite().any()
    assert torch.equal(got[torch.arange(70) != 60], want[torch.arange(70) != 60])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_an_infinite_weight_reaches_the_logits_as_in_fp32(kernels, value, dtype):
    """Splitting a weight into terms must not give inf - inf."""
    x, w = noise(16, 64, dtype=dtype), noise(8, 64)
    w[5, 40] = value
    got = kernels.shrink(x, noise(8, 64, dtype=dtype), w)[1]
    torch.testing.assert_close(
        got, (x.double() @ w.double().T).float(), rtol=1e-5, atol=1e-5, equal_nan=True
    )


@some("tiles fit", "unequal ranks", "shared A", "wide: 160 ranks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tokens_bits_do_not_depend_on_its_batch(kernels, case, dtype):
    case = replace(case, T=70)
    v = sample(case, dtype)
    full = routed(kernels, v, case, "rank_dense")
    for rows in slice(0, 1), slice(40, 57):
        part = {**v, "x": v["x"][rows], "base": v["base"][rows]}
        got = routed(kernels, part, case, "rank_dense")
        for i in (0, 1, 2, 3, 5, 7):  # all but the statistics of the batch
            assert torch.equal(got[i], full[i][rows])


@pytest.mark.parametrize("case", [BY_NAME["one past a tile"], WIDE[1]], ids=lambda c: c.name)
def test_same_bits_in_any_order_of_threads(case, monkeypatch):
    v, dy = sample(case), noise(case.T, case.D_out)
    results = []
    for order in ("forward", "reverse"):
        monkeypatch.setenv("CUDA_SHIM_ORDER", order)
        out = routed(built(), v, case, "rank_dense")
        saved, aux = [out[i] for i in (1, 2, 3, 7)], cotangents(case)
        results.append([*out, *routed_backward(built(), v, case, dy, aux, saved, *all_needed())])
    assert all(map(torch.equal, *results))


@some("tiles fit", "many experts")
def test_ties_go_to_the_lower_id(kernels, case):
    v = sample(case, torch.bfloat16)
    v["router_weight"] = torch.zeros_like(v["router_weight"])
    ids = routed(kernels, {**v, "bias": None, "router_bias": None}, case, "rank_dense")[1]
    assert torch.equal(ids, torch.arange(case.K, dtype=torch.int32).expand(case.T, -1))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@some("tiles fit", "wide: unequal")
def test_a_non_finite_row_affects_no_other(kernels, case, value, gate):
    """Its ids are valid and distinct; all other tokens keep their bits."""
    case = replace(case, gate=gate)
    v = sample(case)
    clean = routed(kernels, v, case, "rank_dense")
    v["x"] = v["x"].clone()
    v["x"][3, 1] = value
    got = routed(kernels, v, case, "rank_dense")
    assert all(0 <= i < case.E for i in got[1][3].tolist())
    assert len(set(got[1][3].tolist())) == case.K
    others = [t for t in range(case.T) if t != 3]
    for i in (0, 1, 2, 3, 5, 7):
        assert torch.equal(got[i][others], clean[i][others])


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_special_logits_as_in_torch(kernels, gate):
    """inf, -inf and NaN, alone and combined, with ties; an identity router passes them on."""
    values = [0.0, 1.0, -2.0, torch.inf, -torch.inf, torch.nan]
    rows = torch.cartesian_prod(*[torch.tensor(values)] * 3)
    options = None, None, 2, gate, True, *DROPS["all"]
    got = [kernels.router_topk(torch.ones(1, 1), row[:, None], *options) for row in rows]
    ids, weights, _, mean_prob, lse, _ = (torch.cat(parts) for parts in zip(*got))
    p = reference.gate_values(rows, gate)
    assert torch.equal(ids.long(), reference.select_topk(p, 2))
    want = p.gather(1, ids.long())
    want = want / torch.where((z := want.sum(1, keepdim=True)) == 0, 1, z)
    assert torch.allclose(weights, want, equal_nan=True, rtol=1e-6, atol=0)
    assert torch.allclose(mean_prob.view_as(p), p, equal_nan=True, rtol=1e-6, atol=1e-38)
    assert torch.allclose(lse, torch.logsumexp(rows, 1), equal_nan=True, rtol=1e-6)


@some("tiles fit", "wide: unequal")
def test_nothing_leaks_from_experts_not_picked(kernels, case):
    """NaN in the A of an expert without tokens reaches neither y nor the gradients of other experts."""
    v = sample(case) | {"dy": noise(case.T, case.D_out), "base": None}
    v |= {"ids": torch.ones(case.T, 1, dtype=torch.int32), "weights": torch.ones(case.T, 1)}
    clean, _ = grouped(kernels, v, case, "rank_dense")
    a = v["lora_A"].clone()
    a[slice(*case.offsets[2:4])] = torch.nan
    y, s = grouped(kernels, v | {"lora_A": a}, case, "rank_dense")
    assert torch.equal(y, clean)
    grads = grouped_backward(kernels, v, case, s, *all_needed())
    assert all(g.isfinite().all() for g in grads)


@some("tiles fit", "shared A")
def test_a_nan_in_lora_B_stays_out_of_gradients(kernels, case):
    """NaN in the B of an expert without tokens: rank-dense y gets 0 * NaN, but dx and dA stay finite."""
    v = sample(case) | {"dy": noise(case.T, case.D_out)}
    v |= {"ids": torch.ones(case.T, 1, dtype=torch.int32), "weights": torch.ones(case.T, 1)}
    _, s = grouped(kernels, v, case, "rank_dense")
    clean = grouped_backward(kernels, v, case, s, *all_needed())
    b = v["lora_B"].clone()
    b[: case.offsets[1]] = torch.nan
    got = grouped_backward(kernels, v | {"lora_B": b}, case, s, *all_needed())
    assert all(map(torch.equal, got, clean))


def test_nothing_added_leaves_base_bit_identical(kernels):
    case = BY_NAME["long"]
    v = sample(case, torch.bfloat16) | {"weights": torch.ones(case.T, 2)}
    ids = torch.full((case.T, 2), -1, dtype=torch.int32)
    for change in ({}, {"scaling": 0 * v["scaling"]}, {"lora_B": 0 * v["lora_B"]}):
        y, _ = grouped(
            kernels, v | {"ids": ids + 3 if change else ids} | change, case, "rank_dense"
        )
        assert torch.equal(y, v["base"])
