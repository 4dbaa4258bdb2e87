"""Reasons why a module cannot have experts, as clauses for messages.

Each check tests one kind of reason: the module itself, its ancestors, or its weight.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import nn

from .linear import linear_features
from .module_tree import Place, Survey
from .placement import LoraMoeLayer

# they read their children's weights only in some modes; unsupported even if the source is unavailable
_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_ROUTER = re.compile(r"Router|Gat(e|ing)$")  # class names of routers
_TENSOR_PARALLEL = re.compile(r"(Column|Row|Colwise|Rowwise)Parallel")
_PEFT_LAYERS = {"BaseTunerLayer", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper"}


def unsupported(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """{path: reason} of the modules that cannot have experts."""
    return reasons_of(Survey(model), paths)


def reasons_of(survey: Survey, paths: Iterable[str]) -> dict[str, str]:
    """unsupported() for an existing Survey."""
    reasons = {path: _reason(Place(survey, path)) for path in paths}
    return {path: reason for path, reason in reasons.items() if reason}


def bypassed(survey: Survey, paths: Iterable[str]) -> dict[str, str]:
    """{path: class that calls the module in one branch and reads its weight in another}."""
    readers = {path: _reader(Place(survey, path)) for path in paths}
    return {path: _name(reader) for path, reader in readers.items() if reader}


def why_not(model: nn.Module, path: str) -> str | None:
    """The reason why the module at this path cannot have experts, or None."""
    return unsupported(model, [path]).get(path)


def _reason(place):
    around = reasons_around(place)
    return around or next((reason for check in _CHECKS if (reason := check(place))), None)


def reasons_around(place: Place) -> str | None:
    """The reason from a module's ancestors and wrappers, independent of what it computes, or None."""
    if not place.path:
        return "the model itself cannot be replaced in place"
    return next((reason for check in _AROUND if (reason := check(place))), None)


def _name(module):
    return type(module).__name__


# --- what already wraps it -----------------------------------------------------------------------


def _has_experts(place):
    if any(isinstance(m, LoraMoeLayer) for m in place.chain):
        return "already has experts"
    return None


def _has_peft(place):
    """Compares class names, since PEFT may not be imported."""
    if any(c.__name__ in _PEFT_LAYERS for m in place.chain for c in type(m).__mro__):
        return (
            "PEFT has adapted it, and its adapter would be frozen and could not be unloaded: call"
            " merge_and_unload() or unload() first, then inject"
        )
    return None


def _is_scripted(place):
    if any(isinstance(m, torch.jit.ScriptModule) for m in place.chain):
        return "TorchScript has compiled it: inject before torch.jit.script"
    return None


def _is_sharded(place):
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    if any(isinstance(m, sharded) for m in place.chain):
        return (
            "FSDP has sharded it, and experts added now would not be synchronized: inject"
            " first, then fully_shard"
        )
    if any(_TENSOR_PARALLEL.search(type(m).__name__) for m in place.chain) or _distributed(place):
        return (
            "tensor-parallel modules cannot have experts: shard with FSDP2 instead (inject"
            " first, then fully_shard)"
        )
    return None


def _is_offloaded_with_its_block(place):
    """Such a hook moves all tensors of a block by their original names."""
    hooks = (getattr(m, "_hf_hook", None) for m in place.chain[:-1])
    if any(getattr(h, "offload", False) and getattr(h, "place_submodules", False) for h in hooks):
        return (
            "accelerate offloads it together with its parent block (preload_module_classes): inject"
            " first, then offload"
        )
    return None


def _distributed(place):
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor and any(isinstance(p, tensor.DTensor) for p in place.module.parameters())


# --- what it computes ----------------------------------------------------------------------------


def _is_not_linear(place):
    module = place.module
    name = _name(module)
    name = f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return f"{name} has no size yet: run the model once first"
    if banks := _fused_experts(place):
        named = ", ".join(banks)
        return f"{name} has fused experts ({named}): name them in target_parameters"
    if linear_features(module) is None or not _multiplies(place):
        return f"{name} is not linear"
    return None


def _fused_experts(place):
    """Names of the 3-D parameters of fused experts; not a convolution's weight."""
    convolution = isinstance(place.module, nn.modules.conv._ConvNd)
    if convolution or "expert" not in (place.path + _name(place.module)).lower():
        return []
    return [name for name, p in place.module.named_parameters(recurse=False) if p.ndim >= 3]


def _multiplies(place):
    """Whether it is linear; with a 2-D weight but no in_features, check that forward multiplies by it."""
    if isinstance(getattr(place.module, "in_features", None), int):
        return True
    forward = place.forward_of(place.module)
    return forward.multiplies or not forward.known


def _is_router(place):
    """Detect a router next to experts by its class, its return value or its size."""
    module, above = place.module, [m for _, m in place.holders]
    tuples = place.forward_of(module).returns_tuple
    experts = _experts_beside(module, place.parent)
    router = experts and (tuples or _is_named(module) or linear_features(module)[1] == experts)
    router = router or any(
        _is_named(inner) and _experts_beside(inner, outer) for outer, inner in pairwise(above)
    )
    if router:
        return "it routes to the model's own experts"
    return f"a {_name(module)} returns a tuple" if tuples else None


def _is_named(module):
    return _ROUTER.search(_name(module)) is not None


def _experts_beside(module, parent):
    """The number of experts next to this module in its parent, 0 if there are none."""
    for name, sibling in parent.named_children():
        if sibling is module or "expert" not in (name + _name(sibling)).lower():
            continue
        if isinstance(sibling, nn.ModuleList | nn.ModuleDict):
            return len(sibling)
        if banks := [p for p in sibling.parameters() if p.ndim == 3]:
            return banks[0].shape[0]
    return 0


# --- uses of its weight --------------------------------------------------------------------------


def _is_bypassed(place):
    reader = next((m for _, m in place.holders[-1:] if isinstance(m, _READ_WEIGHTS)), None)
    if reader is None and not _is_called(place):
        reader = _reader(place)
    return reader and f"{_name(reader)} reads its weight without calling it"


def _reader(place):
    for path, holder in place.holders:
        if any(_fits(path, pattern) for pattern in place.forward_of(holder).reads):
            return holder
    return None


def _is_called(place):
    return any(
        _fits(path, pattern)
        for path, holder in place.holders
        for pattern in place.forward_of(holder).calls
    )


def _fits(path, pattern):
    names, wanted = path.split("."), pattern.split(".")
    return len(names) == len(wanted) and all(w in (n, "*") for n, w in zip(names, wanted))


def _is_tied(place):
    """Only for models that tie weights themselves; other shared weights work and stay shared."""
    ties = any(callable(getattr(m, "tie_weights", None)) for _, m in place.holders)
    other = ties and (_same_weight(place) or _declared(place))
    if not other:
        return None
    return (
        f"its weight is tied to that of {other}, which tie_weights and save_pretrained would break:"
        " untie them first, and set config.tie_word_embeddings = False"
    )


def _same_weight(place):
    weight = place.module._parameters.get("weight")
    others = [] if weight is None else place.survey.holders_of[weight]
    return next((path for path, module in others if module is not place.module), None)


def _declared(place):
    """What transformers will tie it to; on the meta device these may still be two objects."""
    for path, holder in place.holders:
        if not getattr(getattr(holder, "config", None), "tie_word_embeddings", False):
            continue
        keys = getattr(holder, "_tied_weights_keys", None) or ()
        key = f"{path}.weight"
        if any(re.fullmatch(rf"{k}(\..+)?", key) for k in keys):
            return keys[key] if isinstance(keys, dict) and key in keys else "the embeddings"
    return None


_AROUND = (_has_experts, _has_peft, _is_scripted, _is_sharded, _is_offloaded_with_its_block)
_CHECKS = (_is_not_linear, _is_router, _is_bypassed, _is_tied)
