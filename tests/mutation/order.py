"""A pytest plugin (-p tests.mutation.order): runs the tests that killed the last mutants first.

LORA_MOE_KILLERS    a JSON list of test ids, the most likely first
LORA_MOE_REPORT     where to write the id of the first test that fails
"""

import json
import os
from pathlib import Path


def pytest_collection_modifyitems(items):
    killers = json.loads(os.environ.get("LORA_MOE_KILLERS") or "[]")
    rank = {name: place for place, name in enumerate(killers)}
    items.sort(key=lambda item: rank.get(item.nodeid, len(rank)))


def pytest_runtest_logreport(report):
    if report.failed:
        _write(report.nodeid)


def pytest_collectreport(report):
    if report.failed:
        _write(f"{report.nodeid} (collecting)")


def _write(name):
    path = os.environ.get("LORA_MOE_REPORT")
    if path and not Path(path).exists():
        Path(path).write_text(name)
