"""What an adapter's file says of itself: the description in its header, of versions 1 and 2.

    {"version": 2, "library": "0.2.0", "modules_to_save": [module path, ...],
     "adapters": [{"bank": {...}, "router": {"kind": "token", ...}, "context": {}, "training": {...},
                   "modules": [module path, ...]}, ...]}

The bank is what the experts are, the router who decides, the context what is told from outside (nothing
here), and training what a model may choose for itself when it loads.  A router of another kind has its
own fields, and the token router's under "token"; a middle is a section of its own, where there is one.
Of LoRAs on a model's own experts the bank names the target_parameters, and the router's kind is "model".  Of
experts that are FFNs the bank has "placement": "ffn", and target_modules are the FFN's own linear maps.
It is untrusted: every field is checked before anything is built from it.
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

MODEL = "model"  # the kind of a router that is the model's own
_PATH = re.compile(r"(\w+(\.\w+)*)?", re.ASCII)  # "" is the model itself
BANK = ("num_experts", "r", "alpha", "use_rslora", "shared_a")
ROUTER = (
    "top_k", "gate", "renormalize", "temperature", "top_p", "threshold", "router_bias", "selection_bias",
)  # fmt: skip
_TRAINING = (
    "dropout", "target_modules", "exclude_modules", "modules_to_save", "adapter_dtype", "balance_coef",
    "z_coef",
)  # fmt: skip
# version 1 had these fields, flat, and renormalized unless it said otherwise
_FIELDS_1 = (
    "num_experts", "r", "top_k", "alpha", "dropout", "gate", "renormalize", "shared_a", "selection_bias",
    "target_modules", "exclude_modules", "balance_coef", "z_coef",
)  # fmt: skip


def describe(layers: dict[str, LoraMoeLinear], whole: tuple[str, ...]) -> dict:
    """The description of layers by path, and of the modules that train as a whole."""
    from . import __version__  # the package imports this module

    groups: dict[tuple, list[str]] = {}
    for path, layer in layers.items():
        config = layer.config
        if layer.adapter_name is not None:  # PEFT keeps what trains as a whole by itself
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
    if config.placement == FFN:  # training names its linear maps
        sections["bank"]["placement"] = FFN
    return sections if config.middle is None else sections | {"middle": fields["middle"]}


def _router_section(fields):
    if fields["target_parameters"]:
        return {"kind": MODEL}
    token, router = {name: fields[name] for name in ROUTER}, fields["router"]
    return {"kind": "token"} | token if router is None else router | {"token": token}


def read_info(file: BinaryIO, described=None, adapter_dtype=None) -> dict:
    """What a file of ours, or PEFT's folder that is `described`, says of itself; see io.adapter_info."""
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
        raise ValueError(f"{name}: expected adapters, each with its module paths")
    out = []
    for adapter in adapters:
        fields = dict(adapter)
        paths = _read_paths(name, fields.pop("modules", None))
        config, frozen = read(name, fields)
        out.append({"config": config, "modules": paths, "frozen": frozen})
    paths = [path for adapter in out for path in adapter["modules"]]
    if not paths or len(set(paths)) != len(paths):
        raise ValueError(f"{name}: expected module paths, each once, got {len(paths)}")
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
        raise ValueError(f"{name}: expected adapters, each a config and its module paths")
    unknown = [field for field in fields["config"] if field not in _FIELDS_1]
    if unknown:
        raise ValueError(f"{name}: expected fields of version 1, got {brief(unknown)}")
    return LoraMoeConfig.from_dict({"renormalize": True} | fields["config"]), ()


def _read_version_2(name, fields):
    bank = (*BANK, "frozen", "target_parameters", "placement")
    sections = {"bank": bank, "router": ROUTER, "training": _TRAINING, "context": ()}
    if fields.keys() - {"middle"} != sections.keys():
        raise ValueError(
            f"{name}: expected bank, router, context and training, got {brief(fields)}"
        )
    router, fields["router"] = _split_router(name, fields["router"])
    flat = {}
    for section, known in sections.items():
        found = fields[section]
        if not isinstance(found, dict) or not found.keys() <= set(known):
            raise ValueError(f"{name}: expected {section} of {known}, got {brief(found)}")
        flat |= found
    frozen = flat.pop("frozen", [])
    native = router == MODEL
    if native != bool(flat.get("target_parameters")) or (native and not flat.get("num_experts")):
        raise ValueError(
            f"{name}: expected num_experts and target_parameters beside a router of kind {MODEL!r}, and these"
            f" alone, got {brief(fields)}"
        )
    router = None if native else router
    try:
        config = LoraMoeConfig.from_dict(flat | {"router": router, "middle": fields.get("middle")})
        file_names(config)  # tensors may refuse what does not go together
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(frozen, list):
        raise ValueError(f"{name}: expected a list of frozen experts, got {brief(frozen)}")
    return config, expert_ids(frozen, config.num_experts)


def _split_router(name, section):
    """(router or None, the token router's fields) of a router's section."""
    if not isinstance(section, dict):
        raise ValueError(f"{name}: expected a router with a kind, got {brief(section)}")
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
    """The file's tensors under the names of version 2."""
    if info["version"] == 2:
        return info["tensors"]
    names, renamed = file_names(LoraMoeConfig(selection_bias=True)), {}
    for key, place_of in info["tensors"].items():
        path, dot, name = key.rpartition(".")
        renamed[path + dot + names.get(name, name)] = place_of
    return renamed


def fixed_fields(config: LoraMoeConfig) -> dict:
    """What decides the function, written in one way."""
    fields = {name: getattr(config, name) for name in (*BANK, *ROUTER, "router", "middle")}
    fields["target_parameters"] = sorted(config.target_parameters)
    fields["placement"] = config.placement
    if config.placement == FFN:
        fields["target_modules"] = sorted(config.target_modules)
    if isinstance(config.alpha, tuple) and len(set(config.alpha)) == 1:
        fields["alpha"] = config.alpha[0]
    return fields | {"r": config.ranks, "renormalize": config.normalizes}
