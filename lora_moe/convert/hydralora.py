"""HydraLoRA (arXiv 2404.19245), saved by its fork of PEFT: one A, and a head B_i for each of N experts.

<path>.lora_A.weight (r, D_in)   <path>.lora_B0.weight, ... (D_out, r)   <path>.lora_route.weight (N, D_in)

y = W0 x + (lora_alpha / r) sum_i softmax(route(x))_i B_i A x            every token uses all heads
"""

from __future__ import annotations

import re

from .. import peft_format
from ..config import LoraMoeConfig
from ..peft_lora import SILENT
from ..safefile import raise_all
from .bank import (
    NO_LOSSES,
    Experts,
    common,
    expect_floats,
    expect_pairs,
    gather,
    number,
    refuse_unknown,
    unknown_fields,
)
from .source import Source

_KEY = re.compile(r"([\w.]+)\.lora_(A|B(\d{1,4})|route)\.weight", re.ASCII)
_FIELDS = {"r", "lora_alpha", "lora_nums", "merge_weights", "blc_alpha", "blc_weight"}


def fits(source: Source) -> bool:
    return any(".lora_route." in key for key in source.places)


def read(source: Source, notes: list[str]) -> dict[str, Experts]:
    """{module path: experts}; raises ValueError."""
    found, strange = {}, []
    for key in source.places:
        match = _KEY.fullmatch(peft_format.module_path(key))
        if match:
            found.setdefault(match[1], {})[match[3] or match[2]] = key
        else:
            strange.append(key)
    fields = unknown_fields(source.config, SILENT | _FIELDS)
    refuse_unknown(source, strange, fields, "HydraLoRA")
    r, alpha = number(source, "r"), number(source, "lora_alpha")
    problems, heads = [], {}
    for path, keys in found.items():
        E = len(keys) - 2
        wanted = {"A", "route", *map(str, range(E))}
        if E < 1 or keys.keys() != wanted:
            problems.append(
                f"{path}: expected lora_A, lora_route and lora_B0, ..., got {sorted(keys)}"
            )
            continue
        if source.config.get("lora_nums") not in (None, E):
            problems.append(f"{path}: expected {source.config['lora_nums']} lora_B, got {E}")
        heads[path] = [keys[str(i)] for i in range(E)]
        problems += expect_pairs(source, [(keys["A"], b, r) for b in heads[path]], keys["route"], E)
        problems += expect_floats(source, keys.values())
    raise_all(f"{source.name}: expected HydraLoRA's tensors", problems)
    if source.config.get("blc_weight"):
        notes.append(
            f"blc_weight={source.config['blc_weight']!r:.20}, the weight of a training loss, is not"
            " converted; see lora_moe.losses"
        )
    bank = {}
    for path, keys in found.items():
        E = len(heads[path])
        config = LoraMoeConfig(
            num_experts=E, r=r, top_k=E, alpha=alpha, renormalize=False, shared_a=True,
            **common(source, found), **NO_LOSSES,
        )  # fmt: skip
        A, B = gather(source, [keys["A"]], heads[path])
        bank[path] = Experts(config, A, B, source.read(keys["route"]))
    return bank
