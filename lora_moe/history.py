"""The load of every expert over a training run, stored as a small JSON file next to the adapter.

    {"version": 1, "experts": {module path: E}, "steps": [step, ...],
     "load": {module path: [[share of the slots, ...E], ... one per step]}}

A layer that did not run at a step has an empty row.  Above MAX_STEPS entries, every second one is dropped,
so that a long run is still covered from start to end.  The file is untrusted.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from . import safefile
from .replace import replacing

FILE_NAME = "router_history.json"
MAX_STEPS = 512
MAX_BYTES = 256 << 20


class History:
    def __init__(self, experts: dict[str, int]):
        self.experts = dict(experts)
        self.steps: list[int] = []
        self.load_of: dict[str, list[list[float]]] = {name: [] for name in experts}

    def append(self, step: int, loads: dict[str, list[float]]) -> None:
        """Record the loads (E,) of the layers that ran."""
        while self.steps and self.steps[-1] >= step:  # the run resumed from a checkpoint
            self._drop(slice(-1, None))
        self.steps.append(int(step))
        for name, rows in self.load_of.items():
            rows.append([round(float(share), 5) for share in loads.get(name, ())])
        if len(self.steps) > MAX_STEPS:
            self._drop(slice(1, None, 2))

    def _drop(self, which):
        del self.steps[which]
        for rows in self.load_of.values():
            del rows[which]

    def save(self, directory: str | os.PathLike) -> Path:
        """Write directory/router_history.json atomically."""
        path = Path(directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"experts": self.experts, "steps": self.steps, "load": self.load_of}
        with replacing(path) as file:
            file.write(json.dumps({"version": 1} | content, separators=(",", ":")).encode())
        return path

    @classmethod
    def load(cls, directory: str | os.PathLike, missing_ok: bool = False) -> History | None:
        """Read what save wrote.

        Raises:
            FileNotFoundError: if the file is missing; with missing_ok, returns None instead.
            ValueError: if the file is not a history.
        """
        path = Path(directory) / FILE_NAME
        if not os.path.lexists(path):
            if missing_ok:
                return None
            raise FileNotFoundError(
                f"{directory}: expected {FILE_NAME} in it, which LoraMoeTrainer writes next to an"
                " adapter, got none"
            )
        with safefile.open_regular(path) as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise ValueError(f"{path}: expected at most {MAX_BYTES} bytes, got more")
        return cls._checked(str(path), safefile.parse_json(text, str(path)))

    @classmethod
    def _checked(cls, name, content):
        keys = {"version", "experts", "steps", "load"}
        if not isinstance(content, dict) or content.keys() != keys or content["version"] != 1:
            raise ValueError(f"{name}: expected a router history of version 1, got something else")
        experts, steps, load = content["experts"], content["steps"], content["load"]
        if not isinstance(experts, dict) or not all(map(_is_count, experts.values())):
            raise ValueError(f"{name}: expected the number of experts of each module path")
        if not isinstance(steps, list) or not all(type(s) is int for s in steps):
            raise ValueError(f"{name}: expected integer steps")
        if not isinstance(load, dict) or load.keys() != experts.keys():
            raise ValueError(f"{name}: expected load to have the same module paths as experts")
        for path, rows in load.items():
            if not isinstance(rows, list) or len(rows) != len(steps):
                raise ValueError(f"{name}: expected one row per step for {path!a}"[:300])
            if not all(_is_row(row, experts[path]) for row in rows):
                raise ValueError(f"{name}: expected shares in [0, 1] for {path!a}"[:300])
        history = cls(experts)
        history.steps, history.load_of = steps, load
        return history


def _is_count(value):
    return type(value) is int and 1 <= value <= 4096


def _is_row(row, num_experts):
    if not isinstance(row, list) or len(row) not in (0, num_experts):
        return False
    return all(type(v) in (int, float) and math.isfinite(v) and 0 <= v <= 1 for v in row)
