"""Finds the fused experts that match target_parameters, with PEFT's matching rule."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from .config import LoraMoeConfig
from .fused import config_at, fused_names, is_fused, why_unfit
from .module_tree import Place, Survey
from .native_experts import LoraMoeExperts
from .targets import matches, refuse
from .unsupported import reasons_around

_EXPECTED = "target_parameters: expected weights of fused experts"


def experts_of(
    model: nn.Module, config: LoraMoeConfig
) -> dict[str, tuple[nn.Module, LoraMoeConfig]]:
    """{path: (module of fused experts, its configuration)} of the modules that match.

    Warns about names that match no parameter.

    Raises:
        ValueError: if nothing matches (the message lists candidates), or a match is not supported.
    """
    named = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not matches(path, config.exclude_modules):
            base = module.base_layer if isinstance(module, LoraMoeExperts) else module
            own = [name for name in base._parameters if _matches(path, name, config)]
            if own:
                named[path] = own
    if not named:
        nothing = f"but nothing matches {config.target_parameters}"
        raise ValueError(f"{_EXPECTED}, {nothing}{_hint(model)}")
    refuse(_EXPECTED, unsupported_experts(model, named))
    if lost := [t for t in config.target_parameters if not _matches_any(model, t)]:
        warnings.warn(
            f"target_parameters: no parameter matches {', '.join(map(repr, lost))}{_hint(model)}",
            UserWarning,
            stacklevel=4,  # the caller of inject
        )
    modules = {path: model.get_submodule(path) for path in named}
    return {path: (m, config_at(m, config, named[path])) for path, m in modules.items()}


def unsupported_experts(model: nn.Module, names: dict[str, Iterable[str]]) -> dict[str, str]:
    """{path: reason} of modules whose named parameters cannot have a LoRA per expert."""
    survey, reasons = Survey(model), {}
    for path, own in names.items():
        reason = reasons_around(Place(survey, path)) or _why_unfit(model.get_submodule(path), own)
        if reason:
            reasons[path] = reason
    return reasons


def _why_unfit(module, names):
    flat = [n for n in names if (p := module._parameters.get(n)) is not None and p.ndim < 3]
    if flat and not is_fused(module):
        kind = type(module).__name__
        return (
            f"{', '.join(flat)} of a {kind} is a single matrix, not one per expert: name linear modules in"
            " target_modules, and routers to train in modules_to_save"
        )
    return why_unfit(module, names)


def _matches(path, name, config):
    return matches(f"{path}.{name}".removeprefix("."), config.target_parameters)


def _matches_any(model, target):
    return any(
        matches(path, (target,)) for path, _ in model.named_parameters(remove_duplicate=False)
    )


def _hint(model):
    found = {}
    for path, module in model.named_modules():
        if is_fused(module):
            parent = ".".join(path.split(".")[-2:])
            found |= dict.fromkeys(f"{parent}.{name}" for name in fused_names(module))
    return (
        f"; fused experts here: {', '.join(found)}" if found else "; the model has no fused experts"
    )
