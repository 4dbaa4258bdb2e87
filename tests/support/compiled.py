"""Runs a module with compiled kernels in a new process, because the test's own process may interpret them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_compiled(module, *args):
    """The output of `python -m module`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["LORA_MOE_BACKEND"] = "reference"
    command = [sys.executable, "-m", module, *args]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
