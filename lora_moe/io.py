"""save_adapter and load_adapter: configuration and weights in one safetensors file.

    lora_moe.safetensors
        tensors   <module path>.{lora_A, lora_B, router.weight, router.bias, router.selection_bias}, other
                  tensors of routers and middles, and modules_to_save.<path> of fully trained modules
        metadata  {"format": "pt", "lora_moe": description as in adapter_file.py}

With a single file, an interrupted save cannot leave configuration and weights that do not match.  Files are
untrusted: keys, shapes and dtypes must match the model, and the model is changed only after all checks.
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

    The write is atomic: a crash or a full disk leaves an older file intact.  The file includes
    modules_to_save and the ids of frozen experts, but not the base's weights.  A model card template is
    written to README.md unless that file exists.  Wrappers (DDP, FSDP, torch.compile, DeepSpeed's
    engine) do not affect the file.

    In a distributed run only rank 0 (of the shards' mesh) writes, and the others return at once.  With
    sharded parameters (FSDP, ZeRO-3) the call is collective: every rank must make it; all return when
    the file is complete, and all raise if it cannot be written.

    Args:
        model: a model with experts (see inject).
        directory: created if it does not exist.
        state_dict: the model's full, gathered state, as from accelerate's get_state_dict on rank 0.
            It is written instead of the model's values, without synchronizing the processes.
    Returns:
        The file's path.
    Raises:
        ValueError: if the model has no experts, a tensor has NaN or infinite values or another shape
            than the layer's, state_dict lacks a tensor, or there are too many modules for the header.
        OSError: if the file cannot be written, or `directory` is the path of the file itself.
        RuntimeError: on the other ranks of a collective call if the writing rank raised.
    Warns:
        UserWarning: if a trainable parameter is in no adapter and not in modules_to_save.
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
    """Load an adapter saved by save_adapter, or by PEFT for a lora_moe.peft adapter or a LoRA with
    target_parameters.

    A model without experts gets them at the saved paths, and its own parameters are frozen, as in
    inject().  A model with experts must have them at exactly these paths.  It keeps its
    configurations, which may differ only in dropout, dtype, module patterns and coefficients.  The
    model determines the dtypes; every rank reads sharded experts from the file.

    Args:
        model: as above.
        directory: contains lora_moe.safetensors, or PEFT's adapter_model.safetensors and
            adapter_config.json, as regular files; or "owner/name" of a Hugging Face Hub repository if
            there is no such path.
        revision: branch, tag or commit of a repository.
        adapter_dtype: dtype of lora_A and lora_B in a model without experts, overriding the saved one;
            see LoraMoeConfig.
    Returns:
        The same model.
    Raises:
        ValueError: if the file is not an adapter, is damaged, does not fit the model (every problem is
            listed) or has NaN or infinite values; or if the model's weights are on the meta device.
            The model is unchanged.
        OSError: if the file is missing or cannot be read.
    Warns:
        UserWarning: if the file has no values for some of the model's modules_to_save.
    """
    whole, model = model, sharded.unwrapped(model)
    layers = state.layers_by_path(model)
    if _has_own_experts(directory, revision):
        if layers:
            raise ValueError(
                "model: expected a model without experts for a PEFT adapter with target_parameters, got one"
                f" with {len(layers)} layers of experts"
            )
        return with_own_experts(whole, directory, revision, adapter_dtype)
    if not layers:
        sharded.expect_no_wrapper(whole)
    with sharded.at_rest(whole, modified=True):
        _load(model, layers, (directory, revision), adapter_dtype)
    return whole


def _has_own_experts(source, revision):
    """Whether it is a PEFT LoRA on fused experts."""
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
            "model: expected weights on a device, got the meta device; load the base's weights first,"
            " then the adapter"
        )
    for key, tensor in own.items():
        sharded.fill(tensor, values.pop(key))  # pop frees the tensors one by one
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
            " modules_to_save are not in the file and keep their current values",
            stacklevel=4,
        )


def adapter_info(directory: str | os.PathLike, *, revision: str | None = None) -> dict:
    """Configurations, module paths and tensor shapes of a saved adapter; reads only the header.

    Args:
        directory, revision: as in load_adapter.
    Returns:
        {"version": 2, "library": str, "tensors": {key: safefile.Slice},
        "adapters": [{"config": LoraMoeConfig, "modules": [module path, ...], "frozen": [id, ...]}, ...],
        "modules_to_save": [module path, ...]}
    Raises:
        ValueError, OSError: as in load_adapter.
    """
    file, described = open_adapter(directory, revision)
    with file:
        return read_info(file, described)


def open_adapter(source, revision):
    """The open tensor file, and the path of adapter_config.json if PEFT saved it, else None."""
    found = locate.find(source, ((FILE_NAME,), peft_format.FILES), revision)
    if found is not None:
        return safefile.open_regular(found[0]), *(found[1:] or (None,))
    directory = Path(source)
    if directory.is_file():
        safefile.open_regular(directory).close()  # raises for a pickle
    found = sorted(os.listdir(directory))[:20] if directory.is_dir() else "no directory"
    hint = ""
    if directory.is_file():
        hint = f"; pass the directory, {str(directory.parent)!r}"
    elif "adapter_config.json" in found:
        hint = "; this PEFT adapter has no adapter_model.safetensors; load it with PEFT"
    raise FileNotFoundError(f"{directory}: expected {FILE_NAME} in it, found {found}{hint}")


def _tell_unsaved(model, layers):
    kept = {id(p) for layer in layers.values() for p in layer.parameters(recurse=False)}
    for module in state.modules_saved(model, layers).values():
        kept |= {id(p) for p in module.parameters()}
    lost = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if lost:
        warnings.warn(
            f"save_adapter: {', '.join(lost[:6])}{' ...' if lost[6:] else ''} ({len(lost)} in all)"
            " are trainable but not saved: name their modules in LoraMoeConfig(modules_to_save=), or set"
            " requires_grad to False",
            stacklevel=3,
        )
