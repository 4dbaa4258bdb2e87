"""Adapters on disk: one safetensors file that holds configuration and weights.

    lora_moe.safetensors
        tensors   <module path>.{lora_A, lora_B, router_weight, selection_bias}
        metadata  {"format": "pt", "lora_moe": description}, where the description is the JSON of
                  {"version": 1, "library": "0.1.0",
                   "adapters": [{"config": {...}, "modules": [module path, ...]}, ...]}

It is one file, so that no kill in the middle of a save leaves a pair that does not match.  A file
is untrusted: its keys, shapes and dtypes must be those that the model decides, and the model
changes last or not at all.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as brief

import torch
from torch import nn

from . import safefile
from .config import LoraMoeConfig
from .inject import freeze_base, injected, layers_of, place
from .layers import LoraMoeLinear, adapter_tensors
from .targets import why_not

FILE_NAME = "lora_moe.safetensors"
FORMAT_VERSION = 1

_PATH = re.compile(r"(\w+(\.\w+)*)?", re.ASCII)  # "" is the model itself
# what a model may choose for itself when it loads weights
_FREE_FIELDS = ("dropout", "target_modules", "exclude_modules", "balance_coef", "z_coef")


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Write the model's experts, routers and configurations to directory/lora_moe.safetensors.

    All or nothing: after a crash or on a full disk an older file is intact.  The base's weights are
    not in it.

    Args:
        model: with experts in it (see inject).
        directory: made if it does not exist.
    Returns:
        The file's path.
    Raises:
        ValueError: the model has no experts, or more modules than a header holds.
        OSError: the file cannot be written.
    """
    layers = layers_of(model)
    tensors = {key: t.detach().contiguous() for key, t in _keyed(layers).items()}
    metadata = {"format": "pt", "lora_moe": json.dumps(_describe(layers))}
    path = Path(directory) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    safefile.write(path, tensors, metadata)
    return path


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Read what save_adapter wrote, into a model without experts or into one with the same experts.

    A model without experts gets them at the saved paths and its own parameters are frozen, as by
    inject().  A model with experts must have them at exactly these paths, and keeps its
    configurations, which may differ in dropout, module patterns and coefficients only.  The model
    decides the dtypes.

    Args:
        model: as above.
        directory: holds lora_moe.safetensors, a regular file.
    Returns:
        The same model.
    Raises:
        ValueError: the file is no adapter, is damaged, does not fit the model (every misfit is
            listed), or holds NaN or infinite values.  The model is unchanged.
        OSError: the file is missing or cannot be read.
    """
    with _open(Path(directory)) as file:
        info = _read_info(file)
        layers = injected(model)
        wanted = _wanted_by(layers, info) if layers else _wanted_at(model, info)
        values = read_tensors(file, info["tensors"], wanted)
    if layers:
        _fill(layers, values)
        return model
    adapters = {}
    for path, config in _configs(info):
        base = model.get_submodule(path)
        adapters[base] = LoraMoeLinear(base, config)
        _fill({path: adapters[base]}, values)
    place(model, adapters)
    freeze_base(model)
    return model


def adapter_info(directory: str | os.PathLike) -> dict:
    """What a saved adapter says of itself; no tensor is read.

    Returns:
        {"version": 1, "library": str, "tensors": {key: safefile.Slice},
        "adapters": [{"config": LoraMoeConfig, "modules": [module path, ...]}, ...]}
    Raises:
        ValueError, OSError: as load_adapter.
    """
    with _open(Path(directory)) as file:
        return _read_info(file)


def _open(directory):
    path = directory / FILE_NAME
    if os.path.lexists(path):
        return safefile.open_regular(path)
    if directory.is_file():
        safefile.open_regular(directory).close()  # says what is wrong with a pickle
    found = sorted(os.listdir(directory))[:20] if directory.is_dir() else "no directory"
    hint = (
        "; this is an adapter of PEFT, for PeftModel.from_pretrained"
        if "adapter_config.json" in found
        else ""
    )
    raise FileNotFoundError(f"{directory}: expected {FILE_NAME} in it, found {found}{hint}")


# --- the description in the header ---------------------------------------------------------------


def _describe(layers):
    from . import __version__  # the package imports this module

    modules: dict[LoraMoeConfig, list[str]] = {}
    for path, layer in layers.items():
        modules.setdefault(layer.config, []).append(path)
    adapters = [{"config": c.to_dict(), "modules": paths} for c, paths in modules.items()]
    return {"version": FORMAT_VERSION, "library": __version__, "adapters": adapters}


def _read_info(file):
    metadata, tensors = safefile.read_header(file)
    text = metadata.get("lora_moe") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError(
            f"{file.name}: expected lora_moe in its metadata; it is no lora-moe adapter"
        )
    info = safefile.parse_json(text, file.name)
    version = info.get("version") if isinstance(info, dict) else info
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file.name}: expected format version {FORMAT_VERSION}, got {brief(version)}"
        )
    library = info.get("library")
    return {
        "version": FORMAT_VERSION,
        "library": library if isinstance(library, str) else "unknown",
        "adapters": _read_adapters(file.name, info.get("adapters")),
        "tensors": tensors,
    }


def _read_adapters(name, adapters):
    if not isinstance(adapters, list) or not all(map(_is_adapter, adapters)):
        raise ValueError(f"{name}: expected adapters, each a config and its module paths")
    paths = [path for adapter in adapters for path in adapter["modules"]]
    if not paths or len(set(paths)) != len(paths):
        raise ValueError(f"{name}: expected module paths, each once, got {len(paths)}")
    return [{**a, "config": LoraMoeConfig.from_dict(a["config"])} for a in adapters]


def _is_adapter(entry):
    if not isinstance(entry, dict) or entry.keys() != {"config", "modules"}:
        return False
    paths = entry["modules"]
    return isinstance(paths, list) and all(isinstance(p, str) and _PATH.fullmatch(p) for p in paths)


def _configs(info):
    return [
        (path, adapter["config"]) for adapter in info["adapters"] for path in adapter["modules"]
    ]


# --- what the model wants, and whether the file has it -------------------------------------------


def _keyed(layers):
    """{module path.tensor name: tensor} of all layers."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, layer in layers.items()
        for name, tensor in layer.adapter_state().items()
    }


def _wanted_by(layers, info):
    """The tensors of a model that has experts; raises if the file holds other experts."""
    configs = dict(_configs(info))
    problems = [f"{path}: only in the model" for path in layers if path not in configs]
    problems += [f"{path}: only in the file" for path in configs if path not in layers]
    for path in layers.keys() & configs.keys():
        saved, own = _fixed_fields(configs[path]), _fixed_fields(layers[path].config)
        differ = {name: (own[name], saved[name]) for name in own if own[name] != saved[name]}
        if differ:
            problems.append(f"{path}: (model, file) differ in {differ}")
    _raise("adapter: expected the experts of the model", problems)
    return _keyed(layers)


def _fixed_fields(config):
    fields = config.to_dict() | {"r": config.ranks}
    return {name: value for name, value in fields.items() if name not in _FREE_FIELDS}


def _wanted_at(model, info):
    """The tensors, on the meta device, that experts at the saved paths of this model would have."""
    modules, problems, wanted = dict(model.named_modules()), [], {}
    for path, config in _configs(info):
        reason = why_not(model, path) if path in modules else "no such module"
        if reason:
            problems.append(f"{path}: {reason}")
        else:
            wanted |= {
                f"{path}.{name}": t for name, t in adapter_tensors(modules[path], config).items()
            }
    _raise("adapter: expected linear modules at the saved paths", problems)
    return wanted


def read_tensors(file, slices: dict[str, safefile.Slice], wanted: dict[str, torch.Tensor]) -> dict:
    """The tensors of a file, which must be those of `wanted`, in shape too, and finite in its dtypes.

    Raises:
        ValueError: they are not; every misfit is listed, and nothing has been read then.
    """
    _expect_tensors(wanted, slices)
    return {key: _read(file, key, slices[key], t) for key, t in wanted.items()}


def _expect_tensors(wanted, slices):
    problems = [f"{key}: missing" for key in wanted if key not in slices]
    problems += [f"{ascii(key)[:200]}: not the model's" for key in slices if key not in wanted]
    for key in wanted.keys() & slices.keys():
        shape, (dtype, saved, *_) = tuple(wanted[key].shape), slices[key]
        if saved != shape:
            problems.append(f"{key}: expected {shape}, got {saved}")
        if dtype not in safefile.DTYPES:
            problems.append(f"{key}: expected one of {list(safefile.DTYPES)}, got {dtype}")
    _raise("adapter: expected the tensors of the model", problems)


def _raise(expected: str, problems: Iterable[str]):
    if problems:
        raise ValueError(f"{expected}, got\n  " + "\n  ".join(sorted(problems)))


def _read(file, key, place, like):
    """A saved tensor in the dtype of the model's, finite also after that conversion."""
    tensor = safefile.read_tensor(file, place).to(like.dtype)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{key}: expected finite values in {like.dtype}, got NaN or infinity")
    return tensor


@torch.no_grad()
def _fill(layers, values):
    for key, tensor in _keyed(layers).items():
        tensor.copy_(values.pop(key))  # freed one by one
