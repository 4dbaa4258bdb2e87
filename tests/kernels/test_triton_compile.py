"""The machine code of every Triton kernel, compiled without a GPU.

Checks spills, shared memory, tensor cores, load widths and atomics with the launchers' tiles;
docs/generated/gpu_static.md has the table.  One GPU here, the others in `make nightly`.
"""

from __future__ import annotations

import json

import pytest

from benchmarks.static import gpu_static

from ..support.compiled import run_compiled

pytest.importorskip("triton")

MATMULS = (
    "many tokens", "some tokens", "few tokens", "1024 ranks, dense", "unequal ranks", "matmuls",
    "segmented", "segmented, unequal ranks", "decode",
)  # fmt: skip
WANTED = {
    "bfloat16": MATMULS,
    "float32": MATMULS,
    "float16": (
        "many tokens",
        "few tokens",
        "segmented",
    ),  # differs from bf16 only in the router's products
}
SMALL = ("many tokens", "few tokens", "segmented")  # for GPUs with 99 KB of shared memory


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", WANTED)
@pytest.mark.parametrize("target", gpu_static.DEFAULT)
def test_triton_compile(target, dtype):
    rows = gpu_static.rows([target], [dtype], WANTED[dtype])
    assert {row["scenario"] for row in rows} >= {"many tokens", "few tokens"}
    assert any(row["dots"] for row in rows)
    assert broken(rows) == []


@pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=pytest.mark.nightly)])
def test_every_scenario(target):
    assert broken(gpu_static.rows([target], ["bfloat16"])) == []


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", WANTED)
def test_small_shared_memory(dtype):
    """sm_86 and sm_89 are alike, and use the tiles of sm_120."""
    rows = gpu_static.rows(["sm_86", "sm_120"], [dtype], SMALL)
    assert {row["shared_limit"] for row in rows} == {99 * 1024}
    assert broken(rows) == []


def broken(rows):
    return [
        f"{row['kernel']} ({row['scenario']}, {row['config']}): {words}"
        for row in rows
        for words in gpu_static.violations(row)
    ]


GOOD = {
    "spills": 0, "shared_bytes": 1, "shared_limit": 1, "dtype": "bfloat16", "dots": 1, "dot_loops": 1,
    "tensor_core_loops": 1, "tensor_core_ops": 1, "load_bits": 128, "wide_loads": {"x": 128},
    "float_atomics": 0, "another_T": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        {"spills": 1},
        {"shared_bytes": 2},
        {"tensor_core_loops": 0},
        {"tensor_core_ops": 0},
        {"load_bits": 64, "wide_loads": {"x": 64}},
        {"float_atomics": 1},
        {"another_T": True},
    ],
    ids=str,
)
def test_each_violation_is_detected(bad):
    assert list(gpu_static.violations(GOOD)) == []
    assert list(gpu_static.violations(GOOD | bad)) != []


def test_sums_of_the_router_stay_out_of_the_accumulator():
    """Sums over A may use the accumulator, as they are rounded to 16 bits."""
    for dtypes, found in json.loads(
        run_compiled("tests.support.triton_kernels.router_dots")
    ).items():
        assert found["router"], dtypes
        assert set(found["router"]) <= {"zero", "dot"}, dtypes
        assert found["A"] == ["carried"], dtypes
