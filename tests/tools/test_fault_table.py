"""The table of faults in tests/README.md names existing tests, and every fault has one."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parents[1]
_, TABLE = (FOLDER / "README.md").read_text().split("## Faults and their tests")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.splitlines()
    if line.startswith("|") and "---" not in line
][1:]


def test_the_table_is_read():
    assert len(ROWS) > 25 and all(len(row) == 3 for row in ROWS)


def test_every_fault_has_tests_that_exist():
    for fault, _, tests in ROWS:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert named, fault
        for file, test in named:
            source = (FOLDER / file).read_text()
            assert re.search(rf"^def {test}\(", source, re.M), f"{fault}: {file}::{test}"
