"""Reads the folder that PEFT saves for a lora_moe.peft adapter, without PEFT.

    <module path>.lora_moe_experts.<tensor>    tensors of a module's experts
    <module path>.<parameter>                  of a module in modules_to_save

Keys have PEFT's prefix "base_model.model.".
"""

from __future__ import annotations

import re
from pathlib import Path
from reprlib import repr as brief

from . import peft_format
from .config import LoraMoeConfig
from .placement import expert_ids
from .tensors import file_names

PEFT_TYPE = "LORA_MOE"
EXPERTS = "lora_moe_experts"
RENAMED = {"lora_alpha": "alpha", "lora_dropout": "dropout"}  # PEFT's names of our fields
_FIELDS = (
    "num_experts", "r", "top_k", "lora_alpha", "lora_dropout", "gate", "renormalize", "shared_a",
    "selection_bias", "target_modules", "exclude_modules", "balance_coef", "z_coef", "use_rslora",
    "temperature", "top_p", "threshold", "router_bias", "adapter_dtype", "router", "middle",
)  # fmt: skip
# fields that only locate the experts, as the tensors do, or do not affect the function
_OTHER = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "modules_to_save", "frozen_experts",
}  # fmt: skip
_KEY = re.compile(rf"(?:(.*)\.)?{EXPERTS}\.(\w+)", re.ASCII)


def read_info(config_file: Path, tensors: dict) -> dict:
    """The result of lora_moe.adapter_info, with tensors under the names of our own format.

    Args:
        config_file: adapter_config.json.
        tensors: {key: place} of the tensor file.
    Raises:
        ValueError: if it is another method's, has unknown fields, or a value is invalid.
    """
    name, fields = str(config_file), peft_format.read_config(config_file)
    if fields.get("peft_type") != PEFT_TYPE:
        raise ValueError(
            f"{name}: expected peft_type {PEFT_TYPE!r}, got {brief(fields.get('peft_type'))}: load this"
            " PEFT adapter with PeftModel.from_pretrained, or combine several LoRAs with"
            " lora_moe.from_peft"
        )
    unknown = [field for field in fields if field not in {*_FIELDS, *_OTHER} and fields[field]]
    if unknown:
        raise ValueError(f"{name}: expected the fields of a MoeLoraConfig, got {brief(unknown)}")
    flat = {RENAMED.get(f, f): fields[f] for f in _FIELDS if f in fields}
    names = file_names(LoraMoeConfig.from_dict(flat))
    renamed, saved = _renamed(name, fields, tensors, names)
    flat["modules_to_save"] = tuple(saved)
    patterns = {
        field: peft_format.expect_patterns(f"{name}: {pattern}", fields.get(pattern))
        for pattern, field in (("rank_pattern", "r"), ("alpha_pattern", "alpha"))
    }
    groups = {}
    for path in dict.fromkeys(m[1] or "" for key in tensors if (m := _matched(key))):
        special = {f: peft_format.matched(p, path, flat.get(f)) for f, p in patterns.items()}
        special = {f: value for f, value in special.items() if value is not None}
        groups.setdefault(LoraMoeConfig.from_dict(flat | special), []).append(path)
    if not groups:
        raise ValueError(f"{name}: expected {EXPERTS} tensors in the file next to it, got none")
    return {
        "version": 2,
        "library": f"PEFT {fields.get('peft_version')}",
        "adapters": [
            {
                "config": config,
                "modules": paths,
                "frozen": expert_ids(fields.get("frozen_experts") or (), config.num_experts),
            }
            for config, paths in groups.items()
        ],
        "modules_to_save": saved,
        "tensors": renamed,
    }


def _matched(key):
    return _KEY.fullmatch(peft_format.module_path(key))


def _saved_names(name, fields):
    names = fields.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"{name}: expected names in modules_to_save, got {brief(names)}")
    return names


def _renamed(name, fields, tensors, names):
    """({our key: place}, paths of the modules to save)"""
    renamed, saved = {}, {}
    whole = _saved_names(name, fields)
    for key, place in tensors.items():
        path, found = peft_format.module_path(key), _matched(key)
        if found:
            path = ".".join(filter(None, (found[1], names.get(found[2], found[2]))))
        else:
            for module in whole:
                inside = re.match(rf"((?:.+\.)?{re.escape(module)})\.", path)
                if inside:
                    saved[inside[1]] = None
                    path = f"modules_to_save.{path}"
                    break
        if path in renamed:
            raise ValueError(f"{name}: duplicate tensor: {brief(key)} has the name of another one")
        renamed[path] = place
    return renamed, list(saved)
