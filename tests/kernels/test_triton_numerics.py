"""fp32 times 16 bits on tensor cores: products of bf16 terms, summed in an accumulator that truncates."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from ..support import tensor_cores
from ..support.compare import UNIT, relative_error
from ..support.interpreter import interpreting

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels run on tensor cores themselves", allow_module_level=True)
with interpreting():
    kernels = importlib.import_module("lora_moe.triton_kernels")
    numerics = importlib.import_module("lora_moe.triton_kernels.numerics")

MANY = 65  # tokens: from here on one program sums over all of D
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def mma(monkeypatch):
    tensor_cores.modeled(monkeypatch, numerics)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def units(got, want):
    return relative_error(got, want) / UNIT[torch.float32]


def test_the_model_truncates():
    """Adding 2^-24 to 1 a hundred times gives 1; subtracting it is exact; sums over D err by over 30 u."""
    one, tiny = np.ones((1, 16), np.float32), np.zeros((16, 1), np.float32)
    tiny[0] = 2.0**-24
    acc = np.ones((1, 1), np.float32)
    for _ in range(100):
        acc = tensor_cores.multiply(one, tiny, acc)
    assert acc == 1
    assert tensor_cores.multiply(-one, tiny, acc) == np.float32(1 - 2.0**-24)
    a, b = noise(16, 4096).bfloat16(), noise(4096, 8, seed=1).bfloat16()
    in_place = tensor_cores.multiply(a.float().numpy(), b.float().numpy(), np.zeros((16, 8)))
    assert units(torch.from_numpy(in_place), a.double() @ b.double()) > 30


@HALF
@pytest.mark.parametrize("D", [256, 4096])
def test_router_logits_are_full_fp32(mma, D, dtype):
    x, w = noise(MANY, D).to(dtype), noise(8, D, seed=1)
    got = kernels.shrink(x, None, w)[1]
    assert units(got, x.double() @ w.double().T) <= 4


@HALF
def test_router_logits_of_a_16_bit_weight(mma, dtype):
    x, w = noise(MANY, 4096).to(dtype), noise(8, 4096, seed=1).to(dtype)
    got = kernels.shrink(x, None, w)[1]
    assert units(got, x.double() @ w.double().T) <= 4


@HALF
def test_gradient_of_the_router_weight(mma, dtype):
    """dW = dlogits^T x sums over thousands of tokens."""
    h, x = noise(2048, 8), noise(2048, 32, seed=1).to(dtype)
    got = kernels.wgrad(h, x)
    assert units(got, h.double().T @ x.double()) <= 4


@HALF
def test_expand_of_fp32_operands(mma, dtype):
    h, b = noise(16, 64), noise(64, 48, seed=1)
    got = kernels.expand(h, b, None, None, None, dtype)
    assert relative_error(got, h.double() @ b.double()) <= 0.6 * UNIT[dtype]


VALUES = [torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max]


@HALF
@pytest.mark.parametrize("value", VALUES[:3])
def test_an_infinite_input_reaches_the_logits_as_in_fp32(mma, dtype, value):
    """Multiplying it by terms of a weight must not give inf - inf."""
    x, w = noise(16, 64).to(dtype), noise(8, 64, seed=1)
    w[3] = w[3].bfloat16().float()  # its lower terms are zero
    x[2, 5] = value
    x[9, [1, 7]] = torch.tensor([value, -value], dtype=dtype)
    got = kernels.shrink(x, None, w)[1]
    want = (x.double() @ w.double().T).float()
    wrong = ~want.isfinite()
    assert wrong.any()
    torch.testing.assert_close(got[wrong], want[wrong], equal_nan=True)
    assert units(got[~wrong], want[~wrong]) <= 4


@HALF
@pytest.mark.parametrize("value", VALUES)
def test_an_infinite_weight_reaches_the_logits_as_in_fp32(mma, dtype, value):
    x, w = noise(16, 64).to(dtype), noise(8, 64, seed=1)
    w[2, 5] = value
    got = kernels.shrink(x, None, w)[1]
    want = (x.float() @ w.T)[:, 2]
    if value != VALUES[3]:
        torch.testing.assert_close(got[:, 2], want, equal_nan=True)
    others = [e for e in range(8) if e != 2]
    assert units(got[:, others], x.double() @ w[others].double().T) <= 4


@HALF
def test_infinities_through_wgrad_and_expand(mma, dtype):
    h, x = noise(40, 16), noise(40, 32, seed=1).to(dtype)
    x[3, 4] = torch.inf
    h[7, 2] = -torch.inf
    want = h.double().T @ x.double()
    assert torch.equal(kernels.wgrad(h, x).isnan(), want.isnan())
    torch.testing.assert_close(
        kernels.wgrad(h, x).double(), want, equal_nan=True, rtol=1e-5, atol=1e-5
    )
    b = noise(16, 24, seed=2)
    want = h.double() @ b.double()
    got = kernels.expand(h, b, None, None, None, dtype)
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got.isnan(), want.isnan())
