"""The cost model's choices, its overrides, and the output of explain."""

from __future__ import annotations

import pytest
import torch

from lora_moe import backend_info, plan
from lora_moe import functional as F

from ..support.cases import BY_NAME, sample

BACKEND = backend_info()["serving"]["cpu"]
BF16 = torch.bfloat16


def taken(T, E, r, k=2, dtype=BF16, part="sm_90", D=4096):
    return plan.candidates(T, D, D, (r,) * E, k, dtype, part)[0].plan


@pytest.mark.parametrize("part", plan.GPUS)
def test_the_use_of_each_plan(part):
    """decode for few tokens, rank-dense for few ranks, segmented for many: sooner if products cost more."""
    assert taken(1, 8, 16, part=part) == plan.DECODE
    assert taken(8192, 8, 16, part=part) == plan.RANK_DENSE
    assert taken(8192, 256, 16, part=part) == plan.SEGMENTED
    assert taken(8192, 64, 16, dtype=torch.float32, part=part) == plan.SEGMENTED


def test_experts_in_a_tile_equal_a_count():
    """Counted in random routings, sorted as the kernels sort them."""
    g = torch.Generator().manual_seed(0)
    for E, k, tile in (
        (8, 2, 16),
        (64, 2, 16),
        (64, 2, 64),
        (64, 1, 16),
        (64, 4, 16),
        (512, 2, 16),
    ):
        T = 8192
        ids = torch.rand(T, E, generator=g).topk(k).indices
        pairs = ids[:, :2].sort(1).values
        order = torch.argsort(pairs[:, 0] * E + pairs[:, -1])
        counted = [len(t.unique()) for t in ids[order].split(tile)]
        mean = sum(counted) / len(counted)
        assert plan.experts_in_a_tile(T, E, k, tile) == pytest.approx(mean, rel=0.25)


def test_bytes_are_those_of_the_operands():
    """rank_dense at T = 8192, 4096 x 4096, E = 8, r = 16: x, base, y, A, B and W once, S in two halves."""
    dense = {c.plan: c for c in plan.candidates(8192, 4096, 4096, (16,) * 8, 2, BF16, "sm_90")}
    want = 2 * (3 * 8192 * 4096 + 2 * 128 * 4096) + 4 * 8 * 4096 + 2 * 2 * 4 * 8192 * 128
    assert dense[plan.RANK_DENSE].bytes == want
    assert dense[plan.RANK_DENSE].flops == 2 * 8192 * 4096 * (2 * 128 + 8)
    assert plan.DECODE not in dense


def test_the_choice_depends_on_the_class_of_t_only():
    def choice(T):
        return plan.choose("triton", T, 512, 512, tuple(range(0, 1040, 16)), 2, BF16)

    assert choice(1) == choice(7) == choice(16) == plan.DECODE
    assert choice(17) == choice(4096)
    assert choice(4097) == choice(10**6)


def test_override(monkeypatch):
    shapes = 8192, 64, 64, (0, 8, 16), 1, BF16
    with plan.override(plan.SEGMENTED):
        assert plan.choose("triton", *shapes) == plan.SEGMENTED
        with plan.override(None):
            assert plan.choose("triton", *shapes) == plan.RANK_DENSE
        with pytest.raises(ValueError, match="for the cpp backend"), plan.override(plan.DECODE):
            plan.choose("cpp", *shapes)
    assert plan.choose("triton", *shapes) == plan.RANK_DENSE
    monkeypatch.setattr(plan, "_forced", "fastest")  # LORA_MOE_PLAN may hold any text
    with pytest.raises(ValueError, match="'fastest'"):
        plan.choose("triton", *shapes)
    with pytest.raises(ValueError, match="'fastest'"), plan.override("fastest"):
        pass


def test_override_reaches_the_public_functions():
    case = BY_NAME["odd"]
    v = sample(case)
    args = [v[k] for k in ("x", "router_weight", "lora_A", "lora_B")]
    for name in plan.PLANS:
        with plan.override(name):
            if name in plan.BACKENDS[BACKEND]:
                F.routed_lora(*args, case.K, rank_offsets=case.offsets)
            else:
                with pytest.raises(ValueError, match=f"for the {BACKEND} backend"):
                    F.routed_lora(*args, case.K, rank_offsets=case.offsets)


def test_explain(capsys):
    ranked = plan.explain(8192, 4096, 4096, [16] * 64, 2, BF16, "sm_90")
    out = capsys.readouterr().out
    assert [c.plan for c in ranked] == [row.split()[0] for row in out.splitlines()[2:]]
    assert ranked == sorted(ranked, key=lambda c: c.seconds)
    assert out.splitlines()[2].endswith("<- taken")
    assert plan.explain(8, 64, 64, [16] * 8, 2, torch.float32, "cpu") == []
    assert "segmented" in capsys.readouterr().out
    assert plan.explain(8, 64, 64, [4, 8], 2, BF16, torch.device("cuda"))[0].plan == plan.DECODE


@pytest.mark.parametrize(
    "change",
    [{"device": "tpu"}, {"k": 9}, {"k": 0}, {"ranks": []}, {"ranks": [8, 0]}, {"T": -1}],
    ids=str,
)
def test_explain_refuses_invalid_shapes(change):
    call = {
        "T": 8,
        "D_in": 64,
        "D_out": 64,
        "ranks": [16] * 8,
        "k": 2,
        "dtype": BF16,
        "device": "cuda",
    }
    with pytest.raises(ValueError, match=r"device|ranks"):
        plan.explain(**call | change)


def test_where_experts_are_mixed_once_per_sample():
    shape = 8, 8, 576, 1536, torch.float32  # E, r, D_in, D_out
    for shared_a in (False, True):
        assert plan.mixes("cpp", 480, 8, *shape, shared_a)
        assert not plan.mixes("cpp", 16, 16, *shape, shared_a)  # decode
        assert not plan.mixes("cpp", 480, 480, *shape, shared_a)
        assert not plan.mixes("cpp", 480, 4, 1, *shape[1:], shared_a)
        assert not plan.mixes("reference", 480, 8, *shape, shared_a)
        for T in (1, 16, 17, 4096, 100_000):
            assert plan.mixes("triton", T, 1, *shape, shared_a) in (True, False)
    assert not plan.mixes("triton", 4, 4, *shape)
    assert plan.mixes("triton", 8192, 4, 64, 16, 4096, 4096, torch.bfloat16)
