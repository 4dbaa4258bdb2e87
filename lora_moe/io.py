"""Adapters on disk: one safetensors file that holds configuration and weights.

    lora_moe.safetensors
        tensors   <module path>.{lora_A, lora_B, router.weight, router.bias, router.selection_bias}, and what
                  else a router or middle has, modules_to_save.<path> of what trains as a whole
        metadata  {"format": "pt", "lora_moe": description as in adapter_file.py}

It is one file, so that no kill in the middle of a save leaves a pair that does not match.  A file
is untrusted: its keys, shapes and dtypes must be those that the model decides, and the model
changes last or not at all.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from . import locate, model_card, peft_format, safefile, sharded, state
from .adapter_file import configs_of, describe, frozen_of, read_info, slices_of
from .from_peft import with_own_experts
from .injection import layer_around, settle
from .sharded import plain_path
from .steering import layers_of

FILE_NAME = "lora_moe.safetensors"


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write the model's experts, routers and configurations to directory/lora_moe.safetensors.

    All or nothing: after a crash or on a full disk an older file is intact.  The base's weights are
    not in it; modules_to_save and which experts are frozen are.  A README.md beside it, written only where
    there is none, is a model card to be filled in.  Wrappers of the model (DDP, FSDP,
    torch.compile, DeepSpeed's engine) leave no trace in the file.

    In a distributed run one process writes, rank 0 (of the shards' mesh), and the others return.  Only
    where parameters are sharded (FSDP, ZeRO-3) is it a collective that every rank must call; it then
    returns when the file is there, and raises on every rank if it cannot be written.

    Args:
        model: with experts in it (see inject).
        directory: made if it does not exist.
        state_dict: the model's whole state, gathered already, as accelerate's get_state_dict gives it on
            rank 0: its values are written in place of the model's, and no process waits for another.
    Returns:
        The file's path.
    Raises:
        ValueError: the model has no experts, a tensor holds NaN or infinite values or is not of the
            layer's shape, state_dict lacks one, or there are more modules than a header holds.
        OSError: the file cannot be written, or `directory` is the path of the file itself.
        RuntimeError: on the other ranks of a collective, if the one that writes raised.
    Warns:
        UserWarning: a parameter trains but is neither an adapter's nor in modules_to_save.
    """
    whole, model = model, sharded.unwrapped(model)
    layers = state.layers_by_path(model)
    if not layers:
        layers_of(model)  # raises
    path = Path(directory) / FILE_NAME
    if state_dict is not None:
        if sharded.is_writer():
            given = state.taken_from(state_dict, model, layers)
            _write(path, model, layers, sharded.gathered(given))
        return path
    with sharded.at_rest(whole):
        own = state.keyed(layers) | state.saved_tensors(state.modules_saved(model, layers))
        sharded.write_whole(whole, own, lambda tensors: _write(path, model, layers, tensors))
    return path


def _write(path, model, layers, tensors):
    _tell_unsaved(model, layers)
    state.expect_loadable(layers, tensors)
    description = describe(layers, tuple(state.modules_saved(model, layers)))
    into = safefile.path_in(path.parent, path.name)
    safefile.write_described(into, tensors, "lora_moe", description)
    model_card.write(path.parent, model, layers, sum(t.numel() for t in tensors.values()))


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    revision: str | None = None,
    adapter_dtype: str | torch.dtype | None = None,
) -> nn.Module:
    """Read what save_adapter wrote, or what PEFT wrote of a lora_moe.peft adapter, or of a LoRA with
    target_parameters.

    The model is one without experts, or one that has the same experts.
    A model without experts gets them at the saved paths and its own parameters are frozen, as by
    inject().  A model with experts must have them at exactly these paths, and keeps its
    configurations, which may differ in dropout, dtype, module patterns and coefficients only.  The
    model decides the dtypes; sharded experts are filled on every rank, each from the file.

    Args:
        model: as above.
        directory: holds lora_moe.safetensors, or PEFT's adapter_model.safetensors and
            adapter_config.json, regular files; or "owner/name" of a repository of the hub, where no
            directory is called so.
        revision: of a repository: a branch, tag or commit.
        adapter_dtype: of lora_A and lora_B in a model without experts, in place of the saved choice; see
            LoraMoeConfig.
    Returns:
        The same model.
    Raises:
        ValueError: the file is no adapter, is damaged, does not fit the model (every misfit is
            listed), or holds NaN or infinite values; or the model's weights are on the meta device.
            The model is unchanged.
        OSError: the file is missing or cannot be read.
    Warns:
        UserWarning: the file has no values for some of the model's modules_to_save.
    """
    whole, model = model, sharded.unwrapped(model)
    layers = state.layers_by_path(model)
    if _has_own_experts(directory, revision):
        if layers:
            raise ValueError(
                "model: expected one without experts for a folder of PEFT with target_parameters, got"
                f" {len(layers)} layers that have some"
            )
        return with_own_experts(whole, directory, revision, adapter_dtype)
    if not layers:
        sharded.expect_no_wrapper(whole)
    with sharded.at_rest(whole, modified=True):
        _load(model, layers, (directory, revision), adapter_dtype)
    return whole


def _has_own_experts(source, revision):
    """Whether it is PEFT's own LoRA on fused experts."""
    found = locate.find(source, ((FILE_NAME,), peft_format.FILES), revision)
    config = peft_format.read_config(found[1]) if found and found[1:] else {}
    return config.get("peft_type") == "LORA" and bool(config.get("target_parameters"))


def _load(model, layers, source, adapter_dtype):
    file, described = open_adapter(*source)
    with file:
        info = read_info(file, described, adapter_dtype)
        wanted = state.wanted_by(layers, info) if layers else state.wanted_at(model, info)
        whole_tensors = state.wanted_modules(model, info)
        wanted |= whole_tensors
        values = safefile.read_tensors(file, slices_of(info), state.without_memory(wanted))
    if layers:
        adapters = {}
    else:
        modules = {plain_path(path): m for path, m in model.named_modules()}
        adapters = {p: layer_around(modules[p], config) for p, config in configs_of(info)}
        layers = adapters
    own = state.keyed(layers)
    if any(t.device.type == "meta" for t in own.values()):
        raise ValueError(
            "model: expected weights on a device, got experts on meta, whose values would be lost;"
            " load the base's weights first, then the adapter"
        )
    for key, tensor in own.items():
        sharded.fill(tensor, values.pop(key))  # freed one by one
    for path, ids in frozen_of(info).items():
        layers[path].frozen = ids
    if adapters:
        settle(model, adapters.values())
    for key, tensor in whole_tensors.items():
        sharded.fill(tensor, values.pop(key))
    modules = sharded.modules_by_path(model)
    for path in info["modules_to_save"]:
        modules[path].requires_grad_(True)
    _tell_not_in_file(model, layers, info)


def _tell_not_in_file(model, layers, info):
    saved = state.modules_saved(model, layers)
    left = [path for path in saved if path not in info["modules_to_save"]]
    if left:
        warnings.warn(
            f"load_adapter: {', '.join(left[:6])}{' ...' if left[6:] else ''} ({len(left)} in all) of"
            " modules_to_save are not in the file, and keep the values that they have",
            stacklevel=4,
        )


def adapter_info(directory: str | os.PathLike, *, revision: str | None = None) -> dict:
    """What a saved adapter says of itself; no tensor is read.

    Args:
        directory, revision: as load_adapter.
    Returns:
        {"version": 2, "library": str, "tensors": {key: safefile.Slice},
        "adapters": [{"config": LoraMoeConfig, "modules": [module path, ...], "frozen": [id, ...]}, ...],
        "modules_to_save": [module path, ...]}
    Raises:
        ValueError, OSError: as load_adapter.
    """
    file, described = open_adapter(directory, revision)
    with file:
        return read_info(file, described)


def open_adapter(source, revision):
    """The file of tensors, and PEFT's adapter_config.json where PEFT wrote it."""
    found = locate.find(source, ((FILE_NAME,), peft_format.FILES), revision)
    if found is not None:
        return safefile.open_regular(found[0]), *(found[1:] or (None,))
    directory = Path(source)
    if directory.is_file():
        safefile.open_regular(directory).close()  # says what is wrong with a pickle
    found = sorted(os.listdir(directory))[:20] if directory.is_dir() else "no directory"
    hint = ""
    if directory.is_file():
        hint = f"; pass the directory, {str(directory.parent)!r}"
    elif "adapter_config.json" in found:
        hint = "; this is an adapter of PEFT without adapter_model.safetensors, for PEFT alone"
    raise FileNotFoundError(f"{directory}: expected {FILE_NAME} in it, found {found}{hint}")


def _tell_unsaved(model, layers):
    kept = {id(p) for layer in layers.values() for p in layer.parameters(recurse=False)}
    for module in state.modules_saved(model, layers).values():
        kept |= {id(p) for p in module.parameters()}
    lost = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if lost:
        warnings.warn(
            f"save_adapter: {', '.join(lost[:6])}{' ...' if lost[6:] else ''} ({len(lost)} in all)"
            " train but are not saved: name their modules in LoraMoeConfig(modules_to_save=), or set"
            " requires_grad to False",
            stacklevel=3,
        )
