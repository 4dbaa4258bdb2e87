"""Target modules of a configuration with placement="ffn": FFNs, and linear layers outside of FFNs."""

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
    """{path: (module, configuration of its layer)} of FFNs and of linear layers outside of FFNs.

    Raises:
        ValueError: as in targets_of; or if no FFN is among them, or the model itself is one.
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
            "target_modules: expected linear layers of an FFN with placement='ffn', got"
            f" {', '.join(list(found)[:6])} ({len(found)} in all); an FFN has layers D -> F and one F -> D"
        )
    if "" in ffns:
        raise ValueError("target_modules: expected an FFN inside the model, got the model itself")
    lora = config.plain_lora() if plain else None
    return {
        path: (model.get_submodule(path), dataclasses.replace(config, target_modules=tuple(names)))
        for path, names in ffns.items()
    } | {path: (linear, lora) for path, linear in plain.items()}


def unsupported_ffns(model: nn.Module, names: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """{path: reason} of modules that are not an FFN with adaptable linear layers of these names."""
    reasons = {}
    for path, own in names.items():
        module = model.get_submodule(path)
        missing = sorted(set(own) - linears_of(module).keys())
        if not path or ffn_width(module) is None:
            reasons[path] = f"a {type(module).__name__} is not an FFN that can be replaced"
        elif missing:
            reasons[path] = f"it has no linear layer {', '.join(missing)}"
        elif inner := unsupported(model, [f"{path}.{name}" for name in own]):
            reasons[path] = "; ".join(f"{p}: {why}" for p, why in inner.items())
    return reasons
