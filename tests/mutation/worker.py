"""A process that has already imported PyTorch and forks to run pytest: a mutant then only costs its tests.

A request is one line of JSON on standard input, {"arguments": [...], "environment": {...}, "folder": str,
"output": str}; the answer is two lines, the child's process id (also its group's) and its status.
Neither the package nor its tests are imported here, because a mutant changes them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback

import numpy  # noqa: F401
import pytest
import torch  # noqa: F401


def main() -> None:
    del sys.path[0]  # this folder, whose module names may clash with those of the tests
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(request)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(request) -> None:
    """Runs `python -m pytest` in the folder; never returns."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for here, there in ((null, 0), (out, 1), (out, 2)):
            os.dup2(here, there)
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.path.insert(0, request["folder"])
        status = int(pytest.main(request["arguments"]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
