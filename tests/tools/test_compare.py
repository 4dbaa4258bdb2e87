"""assert_accurate must be able to fail: it rejects each of eight wrong results."""

import pytest
import torch

from ..support import eager
from ..support.cases import BY_NAME, in_double, sample
from ..support.compare import assert_accurate

CASE = BY_NAME["long"]


def run(inputs, ids, **change):
    return eager.routed_lora({**inputs, **change}, CASE, ids)[0]


def experts(inputs, shift=0):
    p, _ = eager.gates(inputs["x"], inputs["router_weight"], CASE)
    return (p.topk(CASE.K).indices + shift) % CASE.E


def flip_sign(y):
    y = y.clone()
    y.view(-1)[y.abs().argmax()] *= -1
    return y


def drop(y, last):
    y = y.clone()
    y[last] = 0
    return y


WRONG = {
    "zeros": lambda y, *_: torch.zeros_like(y),
    "scaled": lambda y, *_: (y.double() * (1 + 8 * 2**-24 if y.dtype == torch.float32 else 1.01)).to(y),
    "wrong expert": lambda y, inputs, ids: run(inputs, experts(inputs, shift=1)),
    "last token dropped": lambda y, *_: drop(y, (-1,)),
    "last column dropped": lambda y, *_: drop(y, (slice(None), -1)),
    "gate omitted": lambda y, inputs, ids: eager.grouped_lora(
        inputs["x"], inputs["lora_A"], inputs["lora_B"], ids,
        torch.ones(ids.shape), CASE, inputs["base"], inputs["scaling"],
    ),
    "one sign flipped": lambda y, *_: flip_sign(y),
    "previous call": lambda y, *_: run(sample(CASE, y.dtype, seed=1), experts(sample(CASE, seed=1))),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_rejects(wrong, dtype):
    inputs = sample(CASE, dtype)
    ids = experts(inputs)
    truth, good = run(in_double(inputs), ids), run(inputs, ids)
    assert 0.3 < truth.square().mean().sqrt() < 3
    assert_accurate("eager itself", good, truth, good)
    with pytest.raises(AssertionError):
        assert_accurate(wrong, WRONG[wrong](good, inputs, ids), truth, good)


def test_rejects_nan():
    truth = torch.ones(3, 3, dtype=torch.float64)
    out = truth.clone()
    out[1, 1] = torch.nan
    with pytest.raises(AssertionError):
        assert_accurate("nan", out, truth)
