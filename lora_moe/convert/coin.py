"""MoELoRA of CoIN (arXiv 2403.08350), saved by its fork of PEFT: E experts of rank r / E, all used.

    <path>.lora_A.loraA.<e>.mlp.weight (r / E, D_in)     <path>.lora_B.loraB.<e>.mlp.weight (D_out, r / E)
    <path>.lora_router.weight (E, D_in)

    y = W0 x + (lora_alpha / r) sum_e softmax(router(x))_e B_e A_e x

The fork also stores each expert's weight under a second name without `.mlp`, and the adapter name `default`
may follow lora_A, lora_B and lora_router.
"""

from __future__ import annotations

import re

import torch

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

_KEY = re.compile(
    r"(?P<path>[\w.]+?)\.lora_((?P<letter>[AB])(\.default)?\.lora(?P=letter)\.(?P<e>\d{1,4})"
    r"(?P<mlp>\.mlp)?|router(\.default)?)\.weight",
    re.ASCII,
)
_FIELDS = {"r", "lora_alpha", "expert_num", "task_embedding_dim"}


def fits(source: Source) -> bool:
    experts = any(re.search(r"\.loraA\.\d+\.", key) for key in source.places)
    return experts or source.config.get("peft_type") == "MOE_LORA_CoIN"


def read(source: Source, notes: list[str]) -> dict[str, Experts]:
    """{module path: experts}; raises ValueError."""
    found, second, strange = {}, {}, []
    for key in source.places:
        match = _KEY.fullmatch(peft_format.module_path(key))
        name = match and ("router" if match["e"] is None else (int(match["e"]), match["letter"]))
        names = second if name and name != "router" and not match["mlp"] else found
        if match is None or name in names.get(match["path"], {}):
            strange.append(key)
        else:
            names.setdefault(match["path"], {})[name] = key
    refuse_unknown(
        source, strange, unknown_fields(source.config, SILENT | _FIELDS), "CoIN's MoELoRA"
    )
    r, problems = number(source, "r"), []
    for path in second.keys() - found.keys():
        found[path] = {}
    for path, keys in found.items():
        problems += _problems(source, path, keys, second.get(path, {}), r)
    raise_all(f"{source.name}: expected the tensors of CoIN's MoELoRA", problems)
    _expect_same(source, found, second)
    bank = {}
    for path, keys in found.items():
        E = len(keys) // 2
        A, B = gather(source, *([keys[e, letter] for e in range(E)] for letter in "AB"))
        config = LoraMoeConfig(
            num_experts=E, r=r // E, top_k=E, alpha=number(source, "lora_alpha") / E, renormalize=False,
            **common(source, found), **NO_LOSSES,
        )  # fmt: skip
        bank[path] = Experts(config, A, B, source.read(keys["router"]))
    return bank


def _problems(source, path, keys, second, r):
    E = max(len(keys) // 2, 1)
    wanted = {(e, letter) for e in range(E) for letter in "AB"}
    if keys.keys() != wanted | {"router"} or not second.keys() <= wanted:
        return [
            f"{path}: expected loraA and loraB of each expert and a router, got {len(keys)} tensors"
        ]
    if source.config.get("expert_num") not in (None, E):
        return [f"{path}: expected {source.config['expert_num']} experts, got {E}"]
    if type(r) is not int or r % E:
        return [f"{path}: r: expected a multiple of {E} experts, got {r!r:.20}"]
    pairs = [(keys[e, "A"], keys[e, "B"], r // E) for e in range(E)]
    problems = expect_pairs(source, pairs, keys["router"], E)
    return problems + expect_floats(source, [*keys.values(), *second.values()])


def _expect_same(source, found, second):
    """The tensor under a second name must be the same."""
    for path, names in second.items():
        for name, key in names.items():
            first = found[path][name]
            if source.shape(key) != source.shape(first) or not torch.equal(
                source.read(key), source.read(first)
            ):
                raise ValueError(
                    f"{source.name}: {key}: expected the same values as {first}, got others"
                )
