"""torchrun --nproc-per-node 2 -m tests.stack.processes.run OUT MODULE...: run the modules' checks.

A check is a function `check_*` that every process calls with a shared directory.  The results of each
process are written to OUT/RANK.json after each check: {check: "" or a traceback}.
"""

from __future__ import annotations

import datetime
import importlib
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

# timeout of a collective that not all processes have called
PATIENCE = datetime.timedelta(seconds=60)


def checks_of(module) -> list[str]:
    return [name for name in vars(module) if name.startswith("check_")]


def run(out: Path, names: list[str]):
    found = {}
    for name in names:
        module = importlib.import_module(f"{__package__}.{name}")
        for check in checks_of(module):
            place = out / name / check
            place.mkdir(parents=True, exist_ok=True)
            found[f"{name}.{check}"] = _outcome(getattr(module, check), place)
            (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))


def _outcome(check, place):
    try:
        check(place)
        dist.barrier()
    except Exception:
        return traceback.format_exc(limit=-6)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=PATIENCE)
    run(Path(sys.argv[1]), sys.argv[2:])
    dist.destroy_process_group()
