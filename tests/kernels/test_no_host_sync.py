"""No public function synchronizes the host with a GPU, forward or backward: CUDA graphs require this."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lora_moe import ops
from lora_moe.plan import PLANS

from ..support.compiled import run_compiled

pytest.importorskip("triton")

SOURCES = sorted((Path(__file__).parents[2] / "triton_kernels").glob("*.py"))
WAITS = re.compile(r"\.(item|tolist|cpu|numpy|nonzero|unique\w*|synchronize|masked_select)\(")


@pytest.fixture(scope="module")
def seen():
    return json.loads(run_compiled("tests.support.triton_kernels.host_sync", *PLANS))


@pytest.fixture
def waits(seen):
    return seen["waits"]


def test_every_operator_is_covered(seen):
    assert set(seen["operators"]) == set(ops.SCHEMAS)


def test_no_host_sync(waits):
    calls = {name: found for name, found in waits.items() if not name.startswith("planted")}
    assert len(calls) >= 10 * len(PLANS)
    assert len([name for name in calls if name.startswith("serving")]) == 6
    assert {name: found for name, found in calls.items() if found} == {}


def test_each_kind_of_wait_is_found(waits):
    planted = {name: found for name, found in waits.items() if name.startswith("planted")}
    assert len(planted) == 9
    assert [name for name, found in planted.items() if not found] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_name_no_wait(source):
    lines = source.read_text().splitlines()
    assert [line for line in lines if WAITS.search(line)] == []
