"""Any number of tokens: nothing compiles anew once a model is warm, and every grid can be launched."""

from __future__ import annotations

import json

import pytest

from .compiled import run_compiled

pytest.importorskip("triton")
LARGEST = 65_535  # of a grid's second and third axis


@pytest.fixture(scope="module")
def found():
    return json.loads(run_compiled("tests.triton_kernels.token_counts"))


def test_no_other_number_of_tokens_compiles_anew(found):
    assert len(found["compiled"]) > 100
    assert {name: kernels for name, kernels in found["compiled"].items() if kernels} == {}


def test_three_million_tokens_can_be_launched(found):
    assert len(found["grids"]) > 50
    assert {name: axes for name, axes in found["grids"].items() if max(axes) > LARGEST} == {}
