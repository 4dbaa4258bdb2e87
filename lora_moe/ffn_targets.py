"""Which FFNs, and which linear maps outside of them, a configuration with placement="ffn" names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import nn

from .config import LoraMoeConfig
from .linear import ffn_width, linears_of
from .targets import targets_of
from .unsupported import unsupported


def ffn_targets(
    model: nn.Module, config: LoraMoeConfig
) -> dict[str, tuple[nn.Module, LoraMoeConfig]]:
    """{path: (module, configuration of its layer)}: FFNs, and linear maps that belong to none.

    Raises:
        ValueError: as targets_of; or no FFN is among them, or one is the model itself.
    """
    found, ffns, plain = targets_of(model, config), {}, {}
    for path, linear in found.items():
        parent, _, name = path.rpartition(".")
        if ffn_width(model.get_submodule(parent)) is None:
            plain[path] = linear
        else:
            ffns.setdefault(parent, []).append(name)
    if not ffns:
        raise ValueError(
            "target_modules: expected linear maps of an FFN with placement='ffn', got"
            f" {', '.join(list(found)[:6])} ({len(found)} in all); an FFN holds maps D -> F and one F -> D"
        )
    if "" in ffns:
        raise ValueError(
            "target_modules: expected an FFN inside of the model, got the model itself"
        )
    lora = config.plain_lora() if plain else None
    return {
        path: (model.get_submodule(path), dataclasses.replace(config, target_modules=tuple(names)))
        for path, names in ffns.items()
    } | {path: (linear, lora) for path, linear in plain.items()}


def unsupported_ffns(model: nn.Module, names: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """{path: reason} of modules that are no FFN with linear maps of these names that can take experts."""
    reasons = {}
    for path, own in names.items():
        module = model.get_submodule(path)
        missing = sorted(set(own) - linears_of(module).keys())
        if not path or ffn_width(module) is None:
            reasons[path] = f"a {type(module).__name__} is no FFN that can be replaced"
        elif missing:
            reasons[path] = f"it has no linear map {', '.join(missing)}"
        elif inner := unsupported(model, [f"{path}.{name}" for name in own]):
            reasons[path] = "; ".join(f"{p}: {why}" for p, why in inner.items())
    return reasons
