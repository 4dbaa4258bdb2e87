"""Poly (arXiv 2202.13914) as saved by PEFT, without splits: each of N tasks mixes E skills by sigmoid gates.

<path>.poly_lora_A (1, E, D_in, r)   .poly_lora_B (1, E, r, D_out)   .poly_router.module_logits (N, E)

y = W0 x + (1 / r) (sum_e g_te B_e) (sum_e g_te A_e) x,   g_t = sigmoid(G_t) / its sum  for task t
"""

from __future__ import annotations

import re

from .. import peft_format, presets
from ..peft_lora import SILENT
from ..safefile import raise_all
from .bank import Experts, common, expect_floats, number, refuse_unknown, unknown_fields
from .source import Source

_KEY = re.compile(r"([\w.]+)\.poly_(lora_A|lora_B|router\.module_logits)", re.ASCII)
_FIELDS = {"r", "n_tasks", "n_skills", "n_splits", "poly_type", "init_weights"}


def fits(source: Source) -> bool:
    return source.config.get("peft_type") == "POLY"


def read(source: Source, notes: list[str]) -> dict[str, Experts]:
    """{module path: experts}; raises ValueError."""
    found, strange = {}, []
    for key in source.places:
        match = _KEY.fullmatch(peft_format.module_path(key))
        if match:
            found.setdefault(match[1], {})[match[2]] = key
        else:
            strange.append(key)
    fields = unknown_fields(source.config, SILENT | _FIELDS)
    refuse_unknown(source, strange, fields, "Poly")
    if source.config.get("n_splits", 1) != 1 or source.config.get("poly_type", "poly") != "poly":
        raise ValueError(
            f"{source.name}: expected n_splits=1 and poly_type='poly', as the splits of multi-head"
            f" routing (MHR) are not supported, got {source.config.get('n_splits')!r:.50} and"
            f" {source.config.get('poly_type')!r:.50}"
        )
    N, E, r = (number(source, field) for field in ("n_tasks", "n_skills", "r"))
    problems = []
    for path, keys in found.items():
        problems += _misfits(source, path, keys, (N, E, r)) or expect_floats(source, keys.values())
    raise_all(f"{source.name}: expected Poly's tensors", problems)
    notes.append("set the tasks with use_routing(model, task_ids=), as with PEFT's task_ids=")
    return {path: _experts(source, found, keys, (N, E, r)) for path, keys in found.items()}


def _misfits(source, path, keys, sizes):
    N, E, r = sizes
    if len(keys) < 3:
        return [f"{path}: expected lora_A, lora_B and router.module_logits, got {sorted(keys)}"]
    A, B, logits = (source.shape(keys[n]) for n in ("lora_A", "lora_B", "router.module_logits"))
    wanted = [
        (A, (1, E, A[2] if len(A) == 4 else "D_in", r)),
        (B, (1, E, r, B[3] if len(B) == 4 else "D_out")),
        (logits, (N, E)),
    ]
    return [f"{path}: expected {want}, got {got}" for got, want in wanted if got != want]


def _experts(source, found, keys, sizes):
    N, E, r = sizes
    config = presets.poly(N, E, r, **common(source, found))
    A = source.read(keys["lora_A"])[0].mT.flatten(0, 1).contiguous()  # (E r, D_in)
    B = source.read(keys["lora_B"])[0].flatten(0, 1).contiguous()  # (E r, D_out)
    table = source.read(keys["router.module_logits"])
    return Experts(config, A, B, table, "router_table")
