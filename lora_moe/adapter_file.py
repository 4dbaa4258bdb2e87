"""The description in an adapter file's header: writes format version 2, reads versions 1 and 2.

    {"version": 2, "library": "0.2.0", "modules_to_save": [module path, ...],
     "adapters": [{"bank": {...}, "router": {"kind": "token", ...}, "context": {}, "training": {...},
                   "modules": [module path, ...]}, ...]}

"bank" describes the experts and "router" the routing; "context" is always empty; "training" holds what a
model may change when it loads the file.  Routers other than the token router have their own fields, with
the token router's fields under "token".  A middle, if any, is in a section "middle".  LoRAs on a model's own
experts have "target_parameters" in the bank and a router of kind "model".  Experts that are FFNs have
"placement": "ffn" in the bank, and target_modules name linear layers of the FFN.
The header is untrusted: every field is checked before anything is built from it.
"""

from __future__ import annotations

import dataclasses
import re
from reprlib import repr as brief
from typing import BinaryIO

from . import peft_moe, safefile
from .config import FFN, LoraMoeConfig
from .layers import LoraMoeLinear
from .placement import expert_ids
from .tensors import file_names

FORMAT_VERSION = 2

MODEL = "model"  # kind of the model's own router
_PATH = re.compile(r"(\w+(\.\w+)*)?", re.ASCII)  # "" is the model itself
BANK = ("num_experts", "r", "alpha", "use_rslora", "shared_a")
ROUTER = (
    "top_k", "gate", "renormalize", "temperature", "top_p", "threshold", "router_bias", "selection_bias",
)  # fmt: skip
_TRAINING = (
    "dropout", "target_modules", "exclude_modules", "modules_to_save", "adapter_dtype", "balance_coef",
    "z_coef",
)  # fmt: skip
# version 1 had these fields, not in sections, and its default was renormalize=True
_FIELDS_1 = (
    "num_experts", "r", "top_k", "alpha", "dropout", "gate", "renormalize", "shared_a", "selection_bias",
    "target_modules", "exclude_modules", "balance_coef", "z_coef",
)  # fmt: skip


def describe(layers: dict[str, LoraMoeLinear], whole: tuple[str, ...]) -> dict:
    """The description of the layers {path: layer} and of the fully trained modules `whole`."""
    from . import __version__  # the package imports this module

    groups: dict[tuple, list[str]] = {}
    for path, layer in layers.items():
        config = layer.config
        if layer.adapter_name is not None:  # PEFT saves fully trained modules itself
            config = dataclasses.replace(config, modules_to_save=whole)
        groups.setdefault((config, layer.frozen), []).append(path)
    adapters = [{**_sections(*kind), "modules": paths} for kind, paths in groups.items()]
    return {
        "version": FORMAT_VERSION,
        "library": __version__,
        "adapters": adapters,
        "modules_to_save": list(whole),
    }


def _sections(config, frozen):
    fields = config.to_dict()
    sections = {
        "bank": {name: fields[name] for name in BANK} | {"frozen": list(frozen)},
        "router": _router_section(fields),
        "context": {},
        "training": {name: fields[name] for name in _TRAINING},
    }
    if config.target_parameters:
        sections["bank"]["target_parameters"] = fields["target_parameters"]
    if config.placement == FFN:  # target_modules are in "training"
        sections["bank"]["placement"] = FFN
    return sections if config.middle is None else sections | {"middle": fields["middle"]}


def _router_section(fields):
    if fields["target_parameters"]:
        return {"kind": MODEL}
    token, router = {name: fields[name] for name in ROUTER}, fields["router"]
    return {"kind": "token"} | token if router is None else router | {"token": token}


def read_info(file: BinaryIO, described=None, adapter_dtype=None) -> dict:
    """Description of our file, or of a PEFT folder with the config `described`; see io.adapter_info."""
    if described is not None:
        info = peft_moe.read_info(described, safefile.read_header(file)[1])
    else:
        info = _read_own_info(file)
    if adapter_dtype is not None:
        for adapter in info["adapters"]:
            adapter["config"] = dataclasses.replace(adapter["config"], adapter_dtype=adapter_dtype)
    return info


def _read_own_info(file):
    info, tensors = safefile.read_described(file, "lora_moe", _READERS, "lora-moe adapter")
    version = info["version"]
    adapters = _read_adapters(file.name, info.get("adapters"), _READERS[version])
    library = info.get("library")
    return {
        "version": version,
        "library": library if isinstance(library, str) else "unknown",
        "adapters": adapters,
        "modules_to_save": _read_paths(file.name, info.get("modules_to_save", [])),
        "tensors": tensors,
    }


def _read_adapters(name, adapters, read):
    if not isinstance(adapters, list) or not all(isinstance(a, dict) for a in adapters):
        raise ValueError(f"{name}: expected a list of adapters, each with module paths")
    out = []
    for adapter in adapters:
        fields = dict(adapter)
        paths = _read_paths(name, fields.pop("modules", None))
        config, frozen = read(name, fields)
        out.append({"config": config, "modules": paths, "frozen": frozen})
    paths = [path for adapter in out for path in adapter["modules"]]
    if not paths or len(set(paths)) != len(paths):
        raise ValueError(f"{name}: expected unique module paths, at least one, got {len(paths)}")
    return out


def _read_paths(name, paths):
    valid = isinstance(paths, list) and all(
        isinstance(path, str) and _PATH.fullmatch(path) for path in paths
    )
    if not valid:
        raise ValueError(f"{name}: expected a list of module paths, got {brief(paths)}")
    return paths


def _read_version_1(name, fields):
    if fields.keys() != {"config"} or not isinstance(fields["config"], dict):
        raise ValueError(f"{name}: expected adapters with a config and module paths each")
    unknown = [field for field in fields["config"] if field not in _FIELDS_1]
    if unknown:
        raise ValueError(f"{name}: expected only fields of version 1, got {brief(unknown)}")
    return LoraMoeConfig.from_dict({"renormalize": True} | fields["config"]), ()


def _read_version_2(name, fields):
    bank = (*BANK, "frozen", "target_parameters", "placement")
    sections = {"bank": bank, "router": ROUTER, "training": _TRAINING, "context": ()}
    if fields.keys() - {"middle"} != sections.keys():
        raise ValueError(
            f"{name}: expected the sections bank, router, context and training, got {brief(fields)}"
        )
    router, fields["router"] = _split_router(name, fields["router"])
    flat = {}
    for section, known in sections.items():
        found = fields[section]
        if not isinstance(found, dict) or not found.keys() <= set(known):
            raise ValueError(f"{name}: expected {section} with {known}, got {brief(found)}")
        flat |= found
    frozen = flat.pop("frozen", [])
    native = router == MODEL
    if native != bool(flat.get("target_parameters")) or (native and not flat.get("num_experts")):
        raise ValueError(
            f"{name}: expected num_experts and target_parameters if and only if the router is of kind"
            f" {MODEL!r}, got {brief(fields)}"
        )
    router = None if native else router
    try:
        config = LoraMoeConfig.from_dict(flat | {"router": router, "middle": fields.get("middle")})
        file_names(config)  # raises for combinations that cannot be stored
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(frozen, list):
        raise ValueError(f"{name}: expected a list of frozen expert ids, got {brief(frozen)}")
    return config, expert_ids(frozen, config.num_experts)


def _split_router(name, section):
    """Split the section "router" into (router or None, fields of the token router)."""
    if not isinstance(section, dict):
        raise ValueError(f"{name}: expected router to be a dict with a kind, got {brief(section)}")
    own = dict(section)
    if own.get("kind") == "token":
        del own["kind"]
        return None, own
    if own == {"kind": MODEL}:
        return MODEL, {}
    return own, own.pop("token", {})


_READERS = {1: _read_version_1, 2: _read_version_2}


def configs_of(info: dict) -> list[tuple[str, LoraMoeConfig]]:
    """[(module path, configuration)]"""
    return [
        (path, adapter["config"]) for adapter in info["adapters"] for path in adapter["modules"]
    ]


def frozen_of(info: dict) -> dict[str, tuple[int, ...]]:
    """{module path: ids of its frozen experts}"""
    return {path: adapter["frozen"] for adapter in info["adapters"] for path in adapter["modules"]}


def slices_of(info: dict) -> dict:
    """The file's tensors under their names in version 2."""
    if info["version"] == 2:
        return info["tensors"]
    names, renamed = file_names(LoraMoeConfig(selection_bias=True)), {}
    for key, place_of in info["tensors"].items():
        path, dot, name = key.rpartition(".")
        renamed[path + dot + names.get(name, name)] = place_of
    return renamed


def fixed_fields(config: LoraMoeConfig) -> dict:
    """The fields that determine the output, in a canonical form."""
    fields = {name: getattr(config, name) for name in (*BANK, *ROUTER, "router", "middle")}
    fields["target_parameters"] = sorted(config.target_parameters)
    fields["placement"] = config.placement
    if config.placement == FFN:
        fields["target_modules"] = sorted(config.target_modules)
    if isinstance(config.alpha, tuple) and len(set(config.alpha)) == 1:
        fields["alpha"] = config.alpha[0]
    return fields | {"r": config.ranks, "renormalize": config.normalizes}
