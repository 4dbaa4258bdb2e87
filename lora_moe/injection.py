"""inject and remove: replace a model's modules by mixtures of LoRA experts, and restore them.

Modules are replaced by identity, not by name: a module that is shared under two names stays shared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from .attach import attach, detach
from .config import FFN, LoraMoeConfig
from .ffn_targets import ffn_targets
from .layers import LoraMoeLinear
from .mlp import LoraMoeMLP
from .native_experts import LoraMoeExperts
from .placement import LoraMoeLayer
from .sharded import expect_no_wrapper
from .steering import injected, layers_of
from .target_parameters import experts_of
from .targets import is_all_linear, targets_of

_log = logging.getLogger(__name__)


def inject(
    model: nn.Module, config: LoraMoeConfig | Sequence[LoraMoeConfig], *, freeze: bool = True
) -> nn.Module:
    """Replace the modules that match config.target_modules by LoraMoeLinear, in place.

    With config.target_parameters, a MoE model's own fused experts become LoraMoeExperts; with
    placement="ffn", FFNs become LoraMoeMLP.

    A module that has several names is replaced by one layer under all of them, and is skipped if any
    of its names is excluded.  Other modules stay the same objects, and tied weights stay tied.
    Can be called again with another configuration for other modules.

    Args:
        model: the outermost nn.Module.  If it is or contains transformers models, their save_pretrained
            then keeps the base's names and their generate supports beams; a model that contains
            `model` is not changed.
        config: what to build, and where (see LoraMoeConfig); or several, for disjoint sets of modules;
            or the result of a preset with adapters= (see presets.Adapters).
        freeze: set requires_grad to False on every parameter that does not belong to an adapter.
    Returns:
        The same model; `injected(model)` returns the new layers.
    Raises:
        ValueError: if nothing matches (the message lists linear modules), a match is not supported (the
            message gives the reason; see docs/targets.md), two configurations match one module, or the
            model is already wrapped or sharded (DDP, FSDP, DeepSpeed).  The model is unchanged.
    Warns:
        UserWarning: if a name matches no module, or a parent bypasses a match in some branches.
    """
    expect_no_wrapper(model)
    if hasattr(config, "into"):
        if not freeze:
            raise ValueError("freeze: expected True with adapters=, which trains only routers")
        return config.into(model)
    configs = [config] if isinstance(config, LoraMoeConfig) else list(config)
    saved: dict[str, nn.Module] = {}
    found: dict[str, nn.Module] = {}
    adapters: dict[nn.Module, LoraMoeLayer] = {}
    for each in configs:
        saved |= modules_to_save(model, each.modules_to_save)
    for each in configs:
        own = _targets(model, each)
        targets = _without({path: base for path, (base, _) in own.items()}, saved, each)
        if twice := [path for path, base in targets.items() if base in adapters]:
            raise ValueError(
                f"config: expected each module in one configuration, got {twice[0]} in two"
            )
        found |= targets
        with_config = dict(own[path] for path in targets)
        adapters |= {base: layer_around(base, config) for base, config in with_config.items()}
    settle(model, adapters.values(), freeze)
    for module in saved.values():
        module.requires_grad_(True)
    _log.info("%d modules replaced: %s", len(adapters), ", ".join(found))
    return model


def _targets(model, config) -> dict[str, tuple[nn.Module, LoraMoeConfig]]:
    """{path: (module, configuration of its layer)} of the modules that match a configuration."""
    if config.target_parameters:
        return experts_of(model, config)
    if config.placement == FFN:
        return ffn_targets(model, config)
    return {path: (base, config) for path, base in targets_of(model, config).items()}


def layer_around(base: nn.Module, config: LoraMoeConfig) -> LoraMoeLayer:
    """The layer that the configuration requires, around `base`."""
    if config.target_parameters:
        return LoraMoeExperts(base, config)
    return (LoraMoeMLP if config.placement == FFN else LoraMoeLinear)(base, config)


def _without(found, saved, config):
    """The targets outside of modules_to_save; raises if a named target is inside of one."""
    whole = {inner for module in saved.values() for inner in module.modules()}
    both = [path for path, module in found.items() if module in whole]
    if both and not is_all_linear(config.target_modules):
        raise ValueError(f"modules_to_save: expected modules without targets, got {both[0]}")
    return {path: module for path, module in found.items() if path not in both}


def remove(model: nn.Module) -> nn.Module:
    """Restore the base modules and drop the experts; frozen parameters stay frozen.

    Args:
        model: a model with experts.
    Returns:
        The same model.
    Raises:
        ValueError: if the model has no experts or PEFT's, or is itself a LoraMoeLinear.
    """
    if isinstance(model, LoraMoeLayer):
        kind = type(model).__name__
        raise ValueError(f"model: expected a module around a {kind}, got one; use its base_layer")
    layers = layers_of(model)
    if any(layer.adapter_name is not None for layer in layers.values()):
        raise ValueError(
            "model: expected experts from inject, got PEFT's; call the PEFT model's unload()"
        )
    for layer in layers.values():
        layer.release()
    place(model, {layer: layer.base_layer for layer in layers.values()})
    detach(model)
    return model


# --- shared with io and methods ------------------------------------------------------------------


def place(model: nn.Module, replacement: Mapping[nn.Module, nn.Module]) -> None:
    """Replace every module m of the model by replacement[m], under all of its names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() hides second names
            if child is not None and child in replacement:
                setattr(parent, name, replacement[child])


def settle(model: nn.Module, layers: Iterable[LoraMoeLayer], freeze: bool = True) -> None:
    """Replace the bases by the layers, attach hooks and wrappers, and freeze the base."""
    place(model, {layer.base_layer: layer for layer in layers})
    attach(model)
    if freeze:
        freeze_base(model)


def freeze_base(model: nn.Module) -> None:
    """Set requires_grad to False on parameters outside of adapters and modules_to_save."""
    layers = injected(model).values()
    kept = {p for layer in layers for p in layer.parameters(recurse=False)}
    for names in {layer.config.modules_to_save for layer in layers}:
        for module in modules_to_save(model, names).values():
            kept.update(module.parameters())
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)


def modules_to_save(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """{path: module} of the fully trained modules: path is a name or ends in "." + name.

    Raises:
        ValueError: if a name matches nothing, a module that is or contains a LoraMoeLinear, or a module
            with extra state, which an adapter cannot store.
    """
    found: dict[str, nn.Module] = {}
    for name in names:
        matches = {
            path: module
            for path, module in model.named_modules()
            if path == name or path.endswith("." + name)
        }
        with_experts = [path for path, module in matches.items() if injected(module)]
        if not matches or with_experts:
            got = f"{with_experts[0]}, which has experts" if with_experts else f"{name!r}"
            raise ValueError(f"modules_to_save: expected modules of the model, got {got}")
        for path, module in matches.items():
            if stateful := [m for m in module.modules() if _has_extra_state(m)]:
                raise ValueError(
                    f"modules_to_save: expected modules whose state is tensors only, got {path} with a"
                    f" {type(stateful[0]).__name__}, which has extra state (get_extra_state)"
                )
        found |= matches
    return found


def _has_extra_state(module):
    return type(module).get_extra_state is not nn.Module.get_extra_state
