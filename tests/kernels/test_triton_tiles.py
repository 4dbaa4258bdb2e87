"""The real tiles of each kind of GPU and size class of T; other tests interpret smaller ones.

One kind of GPU here, the others in `make nightly`.  Interpreted with products split into bf16 terms,
as on a GPU, and under the sanitizer.  The bounds between classes of T are lowered so that dozens of tokens
use the tiles of thousands; the last test keeps the real bounds.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

from lora_moe.warmup import TOKENS

from ..support.cases import Case
from ..support.triton_calls import check_routed_lora

if torch.cuda.is_available():
    pytest.skip("every test runs on the GPU's own tiles", allow_module_level=True)
tiles = importlib.import_module("lora_moe.triton_kernels.tiles")
grids = importlib.import_module("lora_moe.triton_kernels.grids")
numerics = importlib.import_module("lora_moe.triton_kernels.numerics")

SMALL_T = 8
CASES = {
    "128 ranks": Case("", 0, 8, 2, 16, 136, 200),
    "256 ranks": Case("", 0, 16, 2, 16, 72, 136, renormalize=False),
    "many experts": Case("", 0, 20, 3, 4, 72, 72, gate="sigmoid"),
    "unequal": Case("", 0, 4, 2, (4, 8, 16, 24), 72, 72, with_bias=True),
    "shared A": Case("", 0, 8, 2, 16, 136, 72, shared_a=True),
}


NIGHTLY = pytest.mark.nightly


@pytest.fixture(params=["hopper", *(pytest.param(p, marks=NIGHTLY) for p in ("ampere", "cdna"))])
def part(request, monkeypatch):
    monkeypatch.setattr(tiles, "family", lambda device: request.param)
    monkeypatch.setattr(
        numerics, "SPLIT", importlib.import_module("triton").language.constexpr(True)
    )
    return request.param


@pytest.fixture
def low_bounds(monkeypatch):
    monkeypatch.setattr(tiles, "SMALL_T", SMALL_T)


@pytest.fixture
def multiprocessors(request, monkeypatch):
    for name in ("shrink", "rank_dense"):
        module = importlib.import_module(f"lora_moe.triton_kernels.{name}")
        monkeypatch.setattr(module, "multiprocessors", lambda device: request.param)


def check(name, T, dtype, plan):
    check_routed_lora(replace(CASES[name], T=T), dtype, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_many_tokens(part, low_bounds, name, dtype):
    check(name, 150, dtype, "rank_dense")


def test_many_tokens_of_fp16(part, low_bounds):
    check("128 ranks", 150, torch.float16, "rank_dense")


@pytest.mark.parametrize("multiprocessors", [4, 16, 64], indirect=True)
def test_tiles_of_more_multiprocessors(part, low_bounds, multiprocessors):
    """64 x 128, 64 x 64 and 32 x 32 tokens and ranks."""
    check("128 ranks", 70, torch.bfloat16, "rank_dense")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [7, 20])
def test_fewer_tokens(part, low_bounds, tokens, dtype):
    check("128 ranks", tokens, dtype, "rank_dense")


@pytest.mark.parametrize("name", ["128 ranks", "many experts", "unequal"])
def test_segmented(part, low_bounds, name):
    check(name, 70, torch.bfloat16, "segmented")


@pytest.mark.parametrize("name", ["128 ranks", "unequal"])
def test_decode(part, low_bounds, name):
    check(name, 7, torch.bfloat16, "decode")


def test_the_tiles_are_those_of_the_gpu(part, low_bounds):
    """The tiles tested above are those that a GPU of this kind uses for thousands of tokens."""
    x = torch.empty(60, 16, dtype=torch.bfloat16)
    lowered = tiles.choose("segmented_dx", x, 128)
    assert lowered["BLOCK_T"] * lowered["BLOCK_D"] >= 2048
    tiles.SMALL_T = 64
    assert tiles.choose("segmented_dx", x.new_empty(4097, 16), 128) == lowered
    assert tiles.choose("segmented_dx", x, 128) != lowered


@pytest.mark.parametrize("tokens, sms", [(150, 4), (8192, 132), (8192, 108), (8192, 148)])
def test_the_largest_tile_of_shrink(tokens, sms):
    """The many tokens above have the tile of a GPU's thousands."""
    most = (16, 32, 64, 128), 128
    assert grids.shrink_shares(tokens, 128, 8, 2, *most, sms)[2] == (128, 128)


def test_warm_up_runs_every_class_of_tokens():
    """grids.py and warm_up list the classes separately, since warm_up works without Triton."""
    assert {grids.class_of(T) for T in TOKENS} == set(grids.CLASSES)


def test_one_token_past_the_largest_bound(part):
    """With the real bound: 4,097 tokens."""
    case = Case("", 4097, 8, 2, 16, 48, 80)
    check_routed_lora(case, torch.bfloat16, "rank_dense")
