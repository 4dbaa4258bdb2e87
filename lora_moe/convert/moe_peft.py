"""LoRAMoE and MoLA as saved by MoE-PEFT: a router and E experts per linear layer.

    <kind>.layers.<L>.<module>.moe_gate.weight                  (E, D_in), kind loramoe or mola
    <kind>.layers.<L>.<module>.experts.<e>.lora_{A,B}.weight    (r, D_in), (D_out, r)
    <kind>.layers.<L>.<module>.lora_{A,B}.weight                a plain LoRA; in LoRAMoE outside of the FFN

    LoRAMoE (arXiv 2312.09979)   y = W0 x + s sum_e softmax(W x)_e B_e A_e x
    MoLA (arXiv 2402.08562)      the same over the top_k experts, with renormalized weights

s is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.  A plain LoRA becomes one expert with gate 1.
Layers are in `model.layers`, as in transformers' Llama, Mistral, Gemma, Phi and Qwen.
"""

from __future__ import annotations

import re

import torch

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
    num_experts,
    number,
    refuse_unknown,
    unknown_fields,
)
from .source import Source

_KEY = re.compile(
    r"(?P<kind>[a-z]+)\.layers\.(?P<path>\d{1,4}(\.\w+)+?)"
    r"\.(?P<name>moe_gate|(experts\.(?P<e>\d{1,4})\.)?lora_(?P<letter>[AB]))\.weight",
    re.ASCII,
)
_FIELDS = {
    *(
        "r",
        "lora_alpha",
        "use_rslora",
        "num_experts",
        "top_k",
        "routing_strategy",
        "name",
        "task_name",
    ),
    *("router_init_range", "router_aux_loss_coef", "router_loss", "lora_init"),
}
_TYPES = {"LORAMOE": "loramoe", "MOLA": "mola", "MIXLORA": "mixlora"}


def kind_of(source: Source) -> str | None:
    """loramoe, mola, or mixlora, which has a different structure; None if it is none of them."""
    prefixes = {key.partition(".")[0] for key in source.places} & set(_TYPES.values())
    by_type = _TYPES.get(str(source.config.get("peft_type")).upper())
    return by_type or next(iter(prefixes), None)


def read(source: Source, notes: list[str], kind: str) -> dict[str, Experts]:
    """{module path: experts}; raises ValueError."""
    found, strange = {}, []
    for key in source.places:
        match = _KEY.fullmatch(key)
        if match and match["kind"] == kind:
            # "gate", (e, "A"), (None, "A"), ...
            name = "gate" if match["name"] == "moe_gate" else (match["e"], match["letter"])
            found.setdefault(f"model.layers.{match['path']}", {})[name] = key
        else:
            strange.append(key)
    refuse_unknown(source, strange, unknown_fields(source.config, SILENT | _FIELDS), kind)
    E = num_experts(source)
    r, problems = number(source, "r"), []
    for path, keys in found.items():
        plain, ids = _experts(keys, E)
        wanted = {(e, letter) for e in ids for letter in "AB"} | (set() if plain else {"gate"})
        if keys.keys() != wanted:
            missing = [_shown(name) for name in wanted - keys.keys()]
            more = [_shown(name) for name in keys.keys() - wanted]
            problems.append(f"{path}: expected {E} experts, got missing {missing}, more {more}")
            continue
        pairs = [(keys[e, "A"], keys[e, "B"], r) for e in ids]
        problems += expect_pairs(source, pairs, keys.get("gate"), E)
        problems += expect_floats(source, keys.values())
    raise_all(f"{source.name}: expected the tensors of {kind}", problems)
    return {path: _bank(source, keys, kind, E, r, found) for path, keys in found.items()}


def _experts(keys, E):
    """Whether it is a plain LoRA, and the experts' ids as they appear in keys."""
    plain = keys.keys() <= {(None, "A"), (None, "B")}
    return plain, [None] if plain else [str(e) for e in range(E)]


def _shown(name):
    return (
        name if isinstance(name, str) else ".".join(str(part) for part in name if part is not None)
    )


def _bank(source, keys, kind, E, r, found):
    plain, ids = _experts(keys, E)
    A, B = gather(source, [keys[e, "A"] for e in ids], [keys[e, "B"] for e in ids])
    fields = common(source, found) | NO_LOSSES | {"r": r, "alpha": number(source, "lora_alpha")}
    fields["use_rslora"] = source.config.get("use_rslora", False)
    if plain:
        config = LoraMoeConfig(num_experts=1, top_k=1, renormalize=True, **fields)
        return Experts(config, A, B, torch.zeros(1, A.shape[1]))
    if kind == "loramoe":
        config = LoraMoeConfig(num_experts=E, top_k=E, renormalize=False, **fields)
    else:
        top_k = number(source, "top_k", 2)
        if source.config.get("router_loss"):  # a balanced loss is K there and 1 here
            fields["balance_coef"] = number(source, "router_aux_loss_coef", 0.001) * top_k
        config = LoraMoeConfig(num_experts=E, top_k=top_k, renormalize=True, **fields)
    return Experts(config, A, B, source.read(keys["gate"]))
