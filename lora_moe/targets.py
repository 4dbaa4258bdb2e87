"""Which modules of a model a configuration names, and whether they can take experts."""

from __future__ import annotations

import re

from torch import nn

from .config import LoraMoeConfig
from .layers import LoraMoeLinear, linear_features

# these pass their children's weights to a fused kernel instead of calling the children
_READ_WEIGHTS_DIRECTLY = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def why_not(model: nn.Module, name: str) -> str | None:
    """The reason why the module at this path cannot take experts, None if it can."""
    if not name:
        return "the model itself cannot be replaced in place"
    module = model.get_submodule(name)
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, LoraMoeLinear) or _inside(model, name):
        return "already has experts"
    if linear_features(module) is None:
        return f"a {type(module).__name__} is not linear"
    if isinstance(parent, _READ_WEIGHTS_DIRECTLY):
        return f"{type(parent).__name__} reads its weight without calling it"
    return None


def _inside(model, name):
    parts = name.split(".")
    ancestors = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(isinstance(model.get_submodule(path), LoraMoeLinear) for path in ancestors)


def targets_of(model: nn.Module, config: LoraMoeConfig) -> dict[str, nn.Module]:
    """{path: module} of what the configuration names and does not exclude; raises if unfit."""
    modules = dict(model.named_modules(remove_duplicate=False))
    excluded = {m for name, m in modules.items() if _matches(name, config.exclude_modules)}
    named = {name: m for name, m in modules.items() if _matches(name, config.target_modules)}
    found = {name: m for name, m in named.items() if name and m not in excluded}
    if not found:
        linear = [name for name in modules if why_not(model, name) is None]
        raise ValueError(
            f"target_modules: expected to match a module, but nothing matches"
            f" {config.target_modules!r} (excluded: {config.exclude_modules!r});"
            f" linear modules here, {len(linear)} in all: {', '.join(linear[:12])}"
        )
    unfit = [f"{name} ({reason})" for name in found if (reason := why_not(model, name))]
    if unfit:
        raise ValueError(f"target_modules: expected linear modules, got {', '.join(unfit)}")
    return found


def _matches(name, pattern):
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == suffix or name.endswith("." + suffix) for suffix in pattern)
