"""benchmarks/static/gpu_static.py finds kernels that violate a guarantee, in PTX and in AMD code."""

from __future__ import annotations

import json

import pytest

from benchmarks.static import gpu_static

from ..support.compiled import run_compiled

pytest.importorskip("triton")

EXPECTED = {
    "narrow loads": "narrow loads {'x': 16}",
    "spills": "spills",
    "shared memory": "bytes of shared memory",
    "float atomics": "float atomics",
}


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "gfx942"])
def rows(request):
    return json.loads(run_compiled("tests.support.triton_kernels.bad_kernels", request.param))


def test_a_good_kernel_has_no_violations(rows):
    assert list(gpu_static.violations(rows["good"])) == []
    assert rows["good"]["tensor_core_ops"] > 0
    assert rows["good"]["fp32_fmas"] == 0
    assert rows["good"]["wide_loads"] == {"x": 128, "B": 128}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_violation_is_found(rows, name):
    words = "; ".join(gpu_static.violations(rows[name]))
    assert EXPECTED[name] in words


def test_a_loop_without_tensor_cores_is_found(rows):
    row = rows["no tensor cores"]
    if row["target"].startswith("gfx"):
        pytest.skip("AMD's take fp32")
    assert "tensor cores in 0 of 1 loops with a dot" in gpu_static.violations(row)
    assert row["fp32_fmas"] >= 64
    assert row["tensor_core_ops"] == 0
