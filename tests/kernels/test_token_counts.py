"""Any number of tokens: a warm model never recompiles, and every grid is within the launch limits.

The same launches show that the short static check covers every kernel.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ..support.compiled import run_compiled

pytest.importorskip("triton")
LARGEST = 65_535  # limit of a grid's second and third axis


@pytest.fixture(scope="module")
def found():
    return json.loads(run_compiled("tests.support.triton_kernels.token_counts"))


def test_no_other_number_of_tokens_compiles_anew(found):
    assert len(found["compiled"]) > 100
    assert {name: kernels for name, kernels in found["compiled"].items() if kernels} == {}


def test_three_million_tokens_can_be_launched(found):
    assert len(found["grids"]) > 50
    assert {name: axes for name, axes in found["grids"].items() if max(axes) > LARGEST} == {}


def test_the_short_static_check_compiles_every_kernel(found):
    sources = (Path(__file__).parents[2] / "triton_kernels").glob("*.py")
    kernels = {name for s in sources for name in re.findall(r"def (_\w+_kernel)\(", s.read_text())}
    assert len(kernels) > 15
    assert kernels - set(found["kernels"]) == set()
