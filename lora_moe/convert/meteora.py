"""MeteoRA (arXiv 2405.13053): a full model with E imported LoRAs and a gate for each linear layer.

    <path>.moe_gate.weight (E, D_in)   <path>.lora_A.weight (R, D_in)   <path>.lora_B.weight (D_out, R)

    y = W0 x + sum over e in topk(gate(x)) of  softmax over the picked(gate(x))_e s_e B_e A_e x

Expert e's rows of lora_A, and columns of lora_B, follow those of e - 1.  Ranks and scales s_e are in the
adapter_config.json of the imported LoRAs, in loading order.  K is not in any file: MeteoRA's code uses 2,
with a temperature of 1.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from reprlib import repr as brief

from .. import peft_format
from ..config import LoraMoeConfig
from ..peft_lora import SILENT
from ..safefile import raise_all
from .bank import NO_LOSSES, Experts, expect_floats, number_in, refuse_unknown, unknown_fields
from .source import Source

_KEY = re.compile(r"([\w.]+)\.(moe_gate|lora_A|lora_B)\.weight", re.ASCII)
# tensors of the base model, which is not converted
_BASE = re.compile(r"(?!.*(lora|moe_gate))[\w.]+\.(weight|bias|inv_freq)", re.ASCII)
_OF_LORA = {"r", "lora_alpha", "use_rslora"}


def fits(source: Source) -> bool:
    gates = any(".moe_gate." in key and ".layers." in key for key in source.places)
    return gates and not any(".experts." in key for key in source.places)


def read(source: Source, notes: list[str], adapters, top_k: int | None) -> dict[str, Experts]:
    """{module path: experts}; raises ValueError."""
    found, base, strange = {}, 0, []
    for key in source.places:
        path = peft_format.module_path(key)
        match = _KEY.fullmatch(path)
        if match:
            found.setdefault(match[1], {})[match[2]] = key
        elif _BASE.fullmatch(path):
            base += 1
        else:
            strange.append(key)
    refuse_unknown(source, strange, (), "MeteoRA")
    if not adapters:
        raise ValueError(
            f"{source.name}: adapters: expected the folders of the LoRAs that MeteoRA imported, in order,"
            " because their adapter_config.json has the ranks and scales, got none"
        )
    configs = [_lora_config(folder) for folder in adapters]
    ranks, alphas = [c["r"] for c in configs], [c["lora_alpha"] for c in configs]
    roots = {c["use_rslora"] for c in configs}
    if len(roots) > 1:
        raise ValueError("adapters: expected use_rslora in all adapters or in none, got both")
    E = len(configs)
    fields = {"num_experts": E, "r": ranks[0] if len(set(ranks)) == 1 else ranks, "alpha": alphas}
    fields |= {"top_k": min(2, E) if top_k is None else top_k, "renormalize": True, **NO_LOSSES}
    fields |= {"use_rslora": roots.pop(), "target_modules": {p.rpartition(".")[2] for p in found}}
    config = LoraMoeConfig(**fields)
    problems = list(itertools.chain(*(_problems(source, p, k, config) for p, k in found.items())))
    raise_all(f"{source.name}: expected MeteoRA's tensors", problems)
    if base:
        notes.append(
            f"{base} tensors of the base model are not converted: load the adapter onto the same base"
        )
    return {path: _experts(source, keys, config) for path, keys in found.items()}


def _experts(source, keys, config):
    B = source.read(keys["lora_B"]).T.contiguous()
    A, gate = (source.read(keys[name]) for name in ("lora_A", "moe_gate"))
    return Experts(config, A, B, gate)


def _problems(source, path, keys, config):
    if len(keys) != 3:
        return [f"{path}: expected moe_gate, lora_A and lora_B, got {sorted(keys)}"]
    (gate, a, b), (E, R) = (
        [source.shape(keys[name]) for name in ("moe_gate", "lora_A", "lora_B")],
        (config.num_experts, sum(config.ranks)),
    )
    if len(a) != 2 or a[0] != R:
        return [
            f"{keys['lora_A']}: expected ({R}, D_in), the ranks of {E} adapters together, got {a}"
        ]
    if len(b) != 2 or b[1] != R:
        return [f"{keys['lora_B']}: expected (D_out, {R}), got {b}"]
    if gate != (E, a[1]):
        return [f"{keys['moe_gate']}: expected {(E, a[1])}, one row per adapter, got {gate}"]
    return expect_floats(source, keys.values())


def _lora_config(folder):
    path = Path(folder) / peft_format.CONFIG
    config = peft_format.read_config(path)
    lost, kind = unknown_fields(config, SILENT | _OF_LORA), config.get("peft_type")
    if lost or kind != "LORA":
        raise ValueError(f"{path}: expected a plain LoRA, got peft_type={brief(kind)} {lost}")
    found = {field: number_in(str(path), config, field, 8) for field in ("r", "lora_alpha")}
    found["use_rslora"] = config.get("use_rslora", False)
    if not isinstance(found["use_rslora"], bool):
        raise ValueError(f"{path}: use_rslora: expected a bool, got {brief(found['use_rslora'])}")
    return found
