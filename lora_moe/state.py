"""An adapter's tensors by their names in a file: the model's, and those that it expects in a file.

Files are untrusted: expected tensors have the shapes and dtypes of the model, on the meta device.
"""

from __future__ import annotations

import torch
from torch import nn

from . import safefile, sharded
from .adapter_file import configs_of, fixed_fields
from .config import FFN
from .ffn_targets import unsupported_ffns
from .injection import modules_to_save
from .placement import LoraMoeLayer
from .sharded import plain_path
from .steering import injected
from .target_parameters import unsupported_experts
from .tensors import adapter_tensors, under_keys
from .unsupported import unsupported

_SAVED = "modules_to_save."


def layers_by_path(model):
    return {plain_path(path): layer for path, layer in injected(model).items()}


def keyed(layers):
    """{name in the file: tensor} of all layers."""
    return {
        key: tensor
        for path, layer in layers.items()
        for key, tensor in under_keys(path, layer.config, layer.adapter_state()).items()
    }


def taken_from(state_dict, model, layers):
    """{name in the file: tensor from state_dict}; raises if one is missing."""
    given = {plain_path(key).removeprefix("module."): t for key, t in state_dict.items()}
    names = {}
    for path, layer in layers.items():
        own = {name: f"{path}.{name}".removeprefix(".") for name in layer.adapter_state()}
        names |= under_keys(path, layer.config, own)
    saved = saved_tensors(modules_saved(model, layers))
    names |= {key: key.removeprefix(_SAVED) for key in saved}
    missing = [name for name in names.values() if name not in given]
    safefile.raise_all(
        "state_dict: expected the model's full state", [f"{n}: missing" for n in missing]
    )
    return {key: given[name] for key, name in names.items()}


def modules_saved(model: nn.Module, layers: dict[str, LoraMoeLayer]) -> dict[str, nn.Module]:
    """{path: module} of the modules in modules_to_save."""
    found = sharded.whole_modules(model)
    for names in {layer.config.modules_to_save for layer in layers.values()}:
        found |= modules_to_save(model, names)
    return {plain_path(path): module for path, module in found.items()}


def state_of(modules: dict[str, nn.Module]) -> dict[tuple[str, str], torch.Tensor]:
    """{(path, name): tensor}, with shared tensors once."""
    state, seen = {}, set()
    for path, module in modules.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                state[path, plain_path(name)] = tensor
    return state


def saved_tensors(modules):
    """{name in the file: tensor} of fully trained modules."""
    return {f"{_SAVED}{path}.{name}": t for (path, name), t in state_of(modules).items()}


def expect_loadable(layers, tensors):
    """Raise for tensors that load_adapter would not accept."""
    wanted = _wanted_tensors({p: (m.base_layer, m.config) for p, m in layers.items()})
    problems = []
    for key, tensor in tensors.items():
        expected = tuple(wanted[key].shape) if key in wanted else tuple(tensor.shape)
        if tuple(tensor.shape) != expected:
            problems.append(f"{key}: expected {expected}, got {tuple(tensor.shape)}")
        elif tensor.device.type == "meta":
            problems.append(f"{key}: expected values, got a tensor on meta")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key}: expected finite values, got NaN or infinity")
    safefile.raise_all("model: expected an adapter that can be loaded again", problems)


# --- the tensors that the model expects in the file ----------------------------------------------


def wanted_by(layers, info):
    """The tensors of a model with experts; raises if the file has other experts."""
    configs = dict(configs_of(info))
    problems = [f"{path}: only in the model" for path in layers if path not in configs]
    problems += [f"{path}: only in the file" for path in configs if path not in layers]
    for path in layers.keys() & configs.keys():
        saved, own = (fixed_fields(configs[path]), fixed_fields(layers[path].config))
        differ = {name: (own[name], saved[name]) for name in own if own[name] != saved[name]}
        if differ:
            problems.append(f"{path}: (model, file) differ in {differ}")
    safefile.raise_all("adapter: expected the experts of the model", problems)
    return keyed(layers)


def wanted_at(model, info):
    """The tensors, on the meta device, of experts at the saved paths of this model."""
    modules = {plain_path(path): (path, m) for path, m in model.named_modules()}
    here = {modules[path][0]: config for path, config in configs_of(info) if path in modules}
    fused = {path: c.target_parameters for path, c in here.items() if c.target_parameters}
    ffns = {path: c.target_modules for path, c in here.items() if c.placement == FFN}
    linear = here.keys() - fused.keys() - ffns.keys()
    reasons = (
        unsupported_experts(model, fused)
        | unsupported_ffns(model, ffns)
        | unsupported(model, linear)
    )
    problems, found = [], {}
    for path, config in configs_of(info):
        reason = reasons.get(modules[path][0]) if path in modules else "no such module"
        if reason:
            problems.append(f"{path}: {reason}")
        else:
            found[path] = modules[path][1], config
    safefile.raise_all("adapter: expected supported modules at the saved paths", problems)
    return _wanted_tensors(found)


def _wanted_tensors(found):
    """The tensors of {path: (base, config)}."""
    return {
        key: tensor
        for path, (base, config) in found.items()
        for key, tensor in under_keys(path, config, adapter_tensors(base, config)).items()
    }


def wanted_modules(model, info):
    """The tensors of the file's modules_to_save."""
    modules = sharded.modules_by_path(model)
    missing = [path for path in info["modules_to_save"] if path not in modules]
    safefile.raise_all("adapter: expected modules_to_save of the model", missing)
    return saved_tensors({path: modules[path] for path in info["modules_to_save"]})


def without_memory(wanted):
    """The same tensors on meta, with their full shapes."""
    return {
        key: torch.empty(sharded.whole_shape(t), dtype=t.dtype, device="meta")
        for key, t in wanted.items()
    }
