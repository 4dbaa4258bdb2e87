"""routed_lora_banks equals routed_lora called for each layer on the same input, on every backend."""

from __future__ import annotations

import importlib

import pytest
import torch

from lora_moe import functional as F
from lora_moe import plan

from ..support.compare import assert_accurate
from ..support.functions import BACKEND

E, D_IN, WIDTHS = 4, 33, (20, 7, 9)
DTYPES = [torch.float32, torch.bfloat16]
PLANS = {"cpp": ["segmented"], "reference": ["segmented"]}.get(BACKEND, ["decode"])


def banks_of(
    dtype, T, ranks=4, shared_a=False, gap=0, apart=False, biases=True, adapter_dtype=None
):
    """Operands that are adjacent in memory, or separate."""
    g, n = torch.Generator().manual_seed(0), len(WIDTHS)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=g)

    R = E * ranks if isinstance(ranks, int) else ranks[-1]
    adapter = adapter_dtype or dtype
    stacked = {
        "router_weights": normal(n * E, D_IN).split(E),
        "lora_As": normal(n * (ranks if shared_a else R), D_IN, scale=D_IN**-0.5)
        .to(adapter)
        .chunk(n),
        "lora_Bs": normal(R, sum(WIDTHS)).to(adapter).split(WIDTHS, 1),
        "scaling": normal(n * E).abs().split(E),
    }
    if biases:
        stacked["biases"] = normal(n * E, scale=0.1).split(E)
        stacked["router_biases"] = normal(n * E).split(E)
    if apart:
        stacked = {name: [t.clone() for t in tensors] for name, tensors in stacked.items()}
    starts = [gap + sum(WIDTHS[:i]) + gap * i for i in range(n)]
    base = normal(T, starts[-1] + WIDTHS[-1] + gap).to(dtype)
    options = {"rank_offsets": ranks, "shared_a": shared_a, "top_k": 2, "starts": starts}
    return {"x": normal(T, D_IN).to(dtype), "base": base} | stacked | options


def one_by_one(v):
    y = v["base"].clone()
    for i, start in enumerate(v["starts"]):
        columns = slice(start, start + v["lora_Bs"][i].shape[1])
        extra = {
            name: v[plural][i]
            for name, plural in (("bias", "biases"), ("router_bias", "router_biases"))
            if v.get(plural) is not None
        }
        y[:, columns] = F.routed_lora(
            v["x"], v["router_weights"][i], v["lora_As"][i], v["lora_Bs"][i], v["top_k"],
            base=v["base"][:, columns], scaling=v["scaling"][i], rank_offsets=v["rank_offsets"],
            shared_a=v["shared_a"], **extra,
        )[0]  # fmt: skip
    return y


@torch.no_grad()
def check(v, name):
    with plan.override(name):
        y, want = F.routed_lora_banks(**v), one_by_one(v)
    if BACKEND in ("cpp", "reference"):
        assert torch.equal(y, want)
    else:  # the rank rows of all banks together determine how the sums over D_in are split
        assert_accurate("y", y, want.double(), units=16 if y.dtype == torch.float32 else 2)
    assert (want - v["base"]).abs().max() > 0.1


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gap": 3},
        {"apart": True},
        {"biases": False},
        {"shared_a": True, "gap": 1},
        {"ranks": [0, 3, 4, 9, 11]},
        {"adapter_dtype": torch.float32},
    ],
    ids=str,
)
def test_each_bank_is_routed_lora(options, dtype, name):
    check(banks_of(dtype, 5, **options), name)


@pytest.mark.parametrize("name", dict.fromkeys([*PLANS, "segmented"]))
@pytest.mark.parametrize("T", [1, 17, 70])
def test_any_number_of_tokens(T, name):
    check(banks_of(torch.float32, T), name)


def test_no_tokens_and_leading_dimensions():
    v = banks_of(torch.float32, 0)
    assert F.routed_lora_banks(**v).shape == v["base"].shape
    v = banks_of(torch.float32, 6)
    y = F.routed_lora_banks(**v)
    more = {k: v[k].unflatten(0, (2, 3)) for k in ("x", "base")}
    assert torch.equal(F.routed_lora_banks(**v | more), y.unflatten(0, (2, 3)))


@pytest.mark.skipif(BACKEND != "triton", reason="launches are Triton's")
def test_all_banks_are_two_launches(monkeypatch):
    """A decoder layer of Llama (q, k, v; o; gate, up; down) takes 8 launches in decoding."""
    counted = []
    for name in ("decode", "shrink"):
        module = importlib.import_module(f"lora_moe.triton_kernels.{name}")
        launch = module.launch

        def count(x, kernel, *args, launch=launch, **options):
            counted.append(kernel)
            launch(x, kernel, *args, **options)

        monkeypatch.setattr(module, "launch", count)
    with torch.no_grad(), plan.override("decode"):
        F.routed_lora_banks(**banks_of(torch.bfloat16, 5))
        assert len(counted) == 2
        F.routed_lora_banks(**banks_of(torch.bfloat16, 5, apart=True))
    assert len(counted) == 2 + 2 * len(WIDTHS)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"lora_As": []}, ValueError, r"banks: expected 3 of each operand, got \[0, 3"),
        ({"starts": [20, 0, 27]}, ValueError, "starts: expected ascending, disjoint columns"),
        ({"starts": [0, 20, 28]}, ValueError, "starts: expected columns within base's 36, got 37"),
        ({"starts": [0, 19, 27]}, ValueError, "starts: expected ascending, disjoint columns"),
        ({"base": torch.zeros(4, 36)}, ValueError, r"base: expected \(5, 36\)"),
        ({"top_k": 5}, ValueError, r"top_k: expected an integer in \[1, 4\]"),
        ({"x": torch.zeros(5, 33, requires_grad=True)}, ValueError, "expected no gradients"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_does_not_fit_raises(change, error, message):
    with pytest.raises(error, match=message):
        F.routed_lora_banks(**banks_of(torch.float32, 5) | change)
