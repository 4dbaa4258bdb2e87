"""MixLoRA as saved by its package and by MoE-PEFT: a router and E experts per FFN, plain LoRAs elsewhere.

    mixlora.layers.<L>.mlp.moe_gate.weight                              (E, D)
    mixlora.layers.<L>.mlp.<proj>.experts.<e>.lora_{A,B}.weight         (r, D_in), (D_out, r)
    mixlora.layers.<L>.self_attn.<proj>.lora_{A,B}.weight

    older files, with routing_strategy mixtral; w1, w2, w3 are gate, down and up; "mlp." is optional
    mixlora.layers.<L>.mlp.gate.weight
    mixlora.layers.<L>.mlp.experts.<e>.{w1,w2,w3}_proj.lora_{A,B}.weight

    MixLoRA (arXiv 2404.15159)   y = sum over e in top-K of g_e FFN_e(x),  g = softmax(W x) renormalized

With mixlora-dynamic, a token uses experts until their gates sum to top_p, without renormalization.  The
experts' r and lora_alpha come from expert_lora if the configuration has it.  Layers are in `model.layers`.
"""

from __future__ import annotations

import re
from reprlib import repr as brief

import torch

from ..config import FFN, LoraMoeConfig
from ..peft_lora import SILENT
from ..safefile import raise_all
from .bank import (
    NO_LOSSES,
    Experts,
    FfnExperts,
    expect_floats,
    expect_pairs,
    gather,
    num_experts,
    number,
    number_in,
    refuse_unknown,
    unknown_fields,
)
from .source import Source

_KEY = re.compile(
    r"mixlora\.layers\.(?P<layer>\d{1,4})\."
    r"(?:(?:mlp\.)?(?P<gate>(?:moe_)?gate)"
    r"|mlp\.(?P<proj>\w+)\.experts\.(?P<e>\d{1,4})\.lora_(?P<letter>[AB])"
    r"|(?:mlp\.)?experts\.(?P<old_e>\d{1,4})\.(?P<old>w[123])_proj\.lora_(?P<old_letter>[AB])"
    r"|(?P<plain>\w+\.\w+)\.lora_(?P<plain_letter>[AB]))\.weight",
    re.ASCII,
)
_OLD = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_STRATEGIES = ("mixlora", "mixlora-dynamic", "mixtral")
_FIELDS = {
    *("r", "lora_alpha", "use_rslora", "num_experts", "top_k", "top_p", "routing_strategy", "name"),
    *(
        "task_name",
        "router_init_range",
        "router_aux_loss_coef",
        "router_loss",
        "lora_init",
        "act_fn",
    ),
    *("expert_lora", "jitter_noise"),
}
_OF_EXPERTS = {"r", "lora_alpha", "lora_dropout", "use_rslora", "lora_init", "bias"}


def read(source: Source, notes: list[str]) -> dict[str, Experts | FfnExperts]:
    """{module path: experts}; raises ValueError."""
    ffns, plain, strange = {}, {}, []
    for key in source.places:
        match = _KEY.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        layer = f"model.layers.{match['layer']}"
        if match["plain"]:
            plain.setdefault(f"{layer}.{match['plain']}", {})[match["plain_letter"]] = key
            continue
        own = ffns.setdefault(f"{layer}.mlp", {})
        if match["gate"]:
            own["gate"] = key
        elif match["old"]:
            own[_OLD[match["old"]], match["old_e"], match["old_letter"]] = key
        else:
            own[match["proj"], match["e"], match["letter"]] = key
    inner = source.config.get("expert_lora") or {}
    unknown = unknown_fields(source.config, SILENT | _FIELDS)
    if not isinstance(inner, dict):
        unknown, inner = [*unknown, f"expert_lora={brief(inner)}"], {}
    unknown += [f"expert_lora.{field}" for field in unknown_fields(inner, _OF_EXPERTS)]
    strategy = source.config.get("routing_strategy", "mixlora")
    if strategy not in _STRATEGIES:
        unknown.append(f"routing_strategy={brief(strategy)}")
    refuse_unknown(source, strange, unknown, "mixlora")
    E = num_experts(source)
    experts = source.config | inner
    problems = [p for path, keys in ffns.items() for p in _unfit(source, path, keys, E, experts)]
    problems += [p for path, keys in plain.items() for p in _unfit_plain(source, path, keys)]
    raise_all(f"{source.name}: expected the tensors of mixlora", problems)
    _tell(source, notes)
    names = tuple(dict.fromkeys(key[0] for keys in ffns.values() for key in keys if key != "gate"))
    config = _config(source, experts, E, strategy)
    lora = LoraMoeConfig(
        num_experts=1, top_k=1, renormalize=True, target_modules=_last_names(plain), **NO_LOSSES,
        **_shared(source, source.config),
    )  # fmt: skip
    return {path: _ffn(source, config, keys, names, E) for path, keys in ffns.items()} | {
        path: _plain(source, lora, keys) for path, keys in plain.items()
    }


def _unfit(source, path, keys, E, experts):
    names = dict.fromkeys(key[0] for key in keys if key != "gate")
    wanted = {(name, str(e), letter) for name in names for e in range(E) for letter in "AB"}
    wanted.add("gate")
    if keys.keys() != wanted:
        missing, more = (
            sorted(map(_shown, s)) for s in (wanted - keys.keys(), keys.keys() - wanted)
        )
        return [f"{path}: expected {E} experts, got missing {brief(missing)}, more {brief(more)}"]
    r, problems, widths = number_in(source.name, experts, "r"), [], set()
    for name in names:
        pairs = [(keys[name, str(e), "A"], keys[name, str(e), "B"], r) for e in range(E)]
        problems += expect_pairs(source, pairs, None, E)
        if not problems:
            widths.add((source.shape(pairs[0][0])[1], source.shape(pairs[0][1])[0]))
    gate = source.shape(keys["gate"])
    if not problems and (len(gate) != 2 or gate[0] != E or not any(gate[1] in w for w in widths)):
        problems.append(f"{keys['gate']}: expected ({E}, D) of an FFN, got {gate}")
    return problems + expect_floats(source, keys.values())


def _unfit_plain(source, path, keys):
    if keys.keys() != {"A", "B"}:
        return [f"{path}: expected lora_A and lora_B, got {sorted(keys.values())}"]
    pair = [(keys["A"], keys["B"], number(source, "r"))]
    return expect_pairs(source, pair, None, 1) + expect_floats(source, keys.values())


def _shown(name):
    return name if isinstance(name, str) else f"{name[0]}.experts.{name[1]}.lora_{name[2]}"


def _tell(source, notes):
    for field, said in (
        ("act_fn", "the FFN's own activation is used"),
        ("jitter_noise", "the router's input gets no noise in training"),
    ):
        if value := source.config.get(field):
            notes.append(f"{source.name}: {field}={brief(value)} is ignored: {said}")


def _shared(source, fields):
    """Fields that the configurations of experts and of plain LoRAs share."""
    dropout = fields.get("lora_dropout") or 0.0
    return {
        "r": number_in(source.name, fields, "r"),
        "alpha": number_in(source.name, fields, "lora_alpha"),
        "use_rslora": fields.get("use_rslora", False),
        "dropout": dropout,
    }


def _config(source, experts, E, strategy):
    """The experts' configuration, without target_modules."""
    dynamic = strategy == "mixlora-dynamic"
    top_k = E if dynamic else number(source, "top_k", 2)
    fields = NO_LOSSES | _shared(source, experts) | {"top_k": top_k, "renormalize": not dynamic}
    if dynamic:
        fields["top_p"] = number(source, "top_p", 0.8)
    if source.config.get("router_loss", True):  # a balanced loss is K there and 1 here
        fields["balance_coef"] = number(source, "router_aux_loss_coef", 0.001) * top_k
    return LoraMoeConfig(num_experts=E, placement=FFN, **fields)


def _last_names(paths):
    return tuple(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def _ffn(source, config, keys, names, E):
    pairs = {
        name: gather(source, *([keys[name, str(e), letter] for e in range(E)] for letter in "AB"))
        for name in names
        if (name, "0", "A") in keys
    }
    return FfnExperts(config, pairs, source.read(keys["gate"]))


def _plain(source, config, keys):
    A, B = gather(source, [keys["A"]], [keys["B"]])
    return Experts(config, A, B, torch.zeros(1, A.shape[1]))
