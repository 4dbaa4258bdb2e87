"""Runs torchrun without reporting gloo's own crashes as failures of ours."""

from __future__ import annotations

import subprocess

GLOO = "terminate called without an active exception"  # of a thread that outlives its process group


def run_to_the_end(command, **options) -> subprocess.CompletedProcess:
    """subprocess.run, repeated once if gloo aborted a process that was exiting."""
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, **options)
        if done.returncode == 0 or GLOO not in done.stderr:
            break
    return done
