"""The cost of a call: CPU seconds, and the increase of this process's peak resident memory."""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path

import pytest

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost:
    seconds: float
    rise: int  # bytes


def _resident(field):
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


@contextmanager
def measured():
    """Measures a block, all threads included; skips the test if the kernel cannot reset the peak."""
    cost = Cost()
    try:
        RESET.write_text("5")
    except OSError as error:
        pytest.skip(f"the peak of resident memory cannot be reset here ({error})")
    before, start = _resident("VmRSS"), time.process_time()
    try:
        yield cost
    finally:
        cost.seconds, cost.rise = time.process_time() - start, _resident("VmHWM") - before
