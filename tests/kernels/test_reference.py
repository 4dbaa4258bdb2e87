"""The reference against literal loops over tokens, experts and rank rows."""

import math

import pytest
import torch

from lora_moe import reference

from ..support.cases import every_case, sample

DOUBLE = torch.float64


def loop_router(x, w, bias, router_bias, K, gate, renormalize):
    """p, ids and weights of one token."""
    logits = [sum(float(a) * float(b) for a, b in zip(row, x, strict=True)) for row in w]
    if router_bias is not None:
        logits = [v + float(b) for v, b in zip(logits, router_bias, strict=True)]
    if gate == "softmax":
        top = max(logits)
        powers = [math.exp(v - top) for v in logits]
        p = [v / sum(powers) for v in powers]
    else:
        p = [1 / (1 + math.exp(-v)) for v in logits]
    score = p if bias is None else [v + float(b) for v, b in zip(p, bias, strict=True)]
    ids = sorted(range(len(p)), key=lambda e: (-score[e], e))[:K]
    total = sum(p[e] for e in ids) if renormalize else 1.0
    return p, ids, [p[e] / total for e in ids], logits


def loop_experts(x, a, b, ids, weights, scaling, offsets, shared_a):
    """sum over slots of w s B_e A_e x for one token, row by row."""
    y = torch.zeros(b.shape[1], dtype=DOUBLE)
    for e, weight in zip(ids, weights, strict=True):
        if e < 0:
            continue
        for row in range(offsets[e], offsets[e + 1]):
            row_a = row - offsets[e] if shared_a else row
            y += weight * float(scaling[e]) * float(a[row_a] @ x) * b[row]
    return y


@every_case
def test_routed_lora(case):
    v = sample(case, DOUBLE)
    out = reference.routed_lora(
        v["x"], v["router_weight"], v["lora_A"], v["lora_B"], v["base"], v["bias"],
        v["router_bias"], v["scaling"],
        case.offsets, case.shared_a, case.K, case.gate, case.renormalize,
    )  # fmt: skip
    y, indices, weights, logits, mean_prob, lse, counts, _ = out
    mean, count = torch.zeros(case.E, dtype=DOUBLE), [0] * case.E
    for t in range(case.T):
        p, ids, gate, row = loop_router(
            v["x"][t], v["router_weight"], v["bias"], v["router_bias"], case.K, case.gate,
            case.renormalize,
        )  # fmt: skip
        want = loop_experts(
            v["x"][t],
            v["lora_A"],
            v["lora_B"],
            ids,
            gate,
            v["scaling"],
            case.offsets,
            case.shared_a,
        )
        if case.with_base:
            want = want + v["base"][t]
        assert indices[t].tolist() == ids
        torch.testing.assert_close(weights[t], torch.tensor(gate, dtype=DOUBLE), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            logits[t], torch.tensor(row, dtype=DOUBLE), rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(y[t], want, rtol=1e-12, atol=1e-12)
        assert math.isclose(lse[t], math.log(sum(math.exp(z) for z in row)), rel_tol=1e-12)
        mean += torch.tensor(p, dtype=DOUBLE) / case.T
        for e in ids:
            count[e] += 1
    assert counts.tolist() == count
    torch.testing.assert_close(mean_prob, mean, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shared_a", [False, True])
def test_grouped_lora_with_empty_and_repeated_slots(shared_a):
    g = torch.Generator().manual_seed(0)
    offsets = [0, 2, 4, 6]
    x, b = (torch.randn(s, generator=g, dtype=DOUBLE) for s in ((4, 5), (6, 3)))
    a = torch.randn(2 if shared_a else 6, 5, generator=g, dtype=DOUBLE)
    ids = torch.tensor([[0, 2], [1, 1], [-1, 2], [-1, -1]], dtype=torch.int32)
    weights = torch.randn(4, 2, generator=g, dtype=DOUBLE)
    scaling = torch.tensor([1.0, 2.0, 0.5], dtype=DOUBLE)
    y, _ = reference.grouped_lora(x, a, b, None, ids, weights, scaling, offsets, shared_a)
    for t in range(4):
        want = loop_experts(
            x[t], a, b, ids[t].tolist(), weights[t].tolist(), scaling, offsets, shared_a
        )
        torch.testing.assert_close(y[t], want, rtol=1e-12, atol=1e-13)


def test_select_topk_breaks_ties_low_and_puts_nan_last():
    nan = math.nan
    scores = torch.tensor([[1.0, 3, 3, 1], [nan, 1, nan, 1], [nan] * 4, [-math.inf, nan, 0, -1]])
    want = [[1, 2, 0], [1, 3, 0], [0, 1, 2], [2, 3, 0]]
    assert reference.select_topk(scores, 3).tolist() == want
