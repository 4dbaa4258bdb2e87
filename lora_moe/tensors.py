"""The tensors that a layer adds to its base: names, shapes, dtypes, device, and names in files.

Letters: E experts, R rank rows of all experts together, D_in and D_out the linear's sizes.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

from . import fused
from .components import TensorSpec
from .config import FFN, LoraMoeConfig
from .linear import ffn_width, linear_features
from .reference import accumulator
from .routers import TokenRouter

_ADAPTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def file_names(config: LoraMoeConfig) -> dict[str, str]:
    """{name of a layer's tensor: its name in the file}."""
    if config.target_parameters:
        names = [target.rpartition(".")[2] for target in config.target_parameters]
        return {f"lora_{x}_{name}": f"{name}.lora_{x}" for name in names for x in "AB"}
    if config.placement == FFN:
        own = config.target_modules
        plain = not isinstance(own, str) and own and all("." not in name for name in own)
        if not plain or len(set(own)) < len(own):
            raise ValueError(
                f"target_modules: expected names of an FFN's linear layers, got {own!r:.99}"
            )
        names = {f"lora_{x}_{n}": f"{n}.lora_{x}" for n in own for x in "AB"}
    else:
        names = {"lora_A": "lora_A", "lora_B": "lora_B"}
    components = {"router": config.router or TokenRouter(), "middle": config.middle}
    for section, component in components.items():
        for name in () if component is None else component.tensors(config, 1, 1):
            names[name] = f"{section}.{name.removeprefix(section + '_')}"
    return names


def under_keys(path: str, config: LoraMoeConfig, tensors: dict) -> dict:
    """A layer's {name: value} with the names in the file as keys."""
    names = file_names(config)
    return {f"{path}.{names[name]}".removeprefix("."): t for name, t in tensors.items()}


def adapter_dtype(base: nn.Module, config: LoraMoeConfig) -> torch.dtype:
    """Dtype of lora_A and lora_B for this base; see LoraMoeConfig.adapter_dtype."""
    return _dtype_beside(getattr(getattr(base, "weight", None), "dtype", None), config)


def _dtype_beside(own, config):
    own = own if own in _ADAPTER_DTYPES else torch.float32  # quantized
    if config.adapter_dtype is None:
        return accumulator(own)
    return own if config.adapter_dtype == "base" else getattr(torch, config.adapter_dtype)


def adapter_tensors(base: nn.Module, config: LoraMoeConfig) -> dict[str, torch.Tensor]:
    """The tensors that a layer adds to `base`, on the meta device."""
    if config.target_parameters:
        return _beside_fused(base, fused.config_at(base, config))
    if config.placement == FFN:
        maps = {f"_{name}": base.get_submodule(name) for name in config.target_modules}
        sizes = ffn_width(base), ffn_width(base)
    else:
        maps, sizes = {"": base}, linear_features(base)
    R, tensors = sum(config.ranks), {}
    for of, linear in maps.items():
        (D_in, D_out), dtype = linear_features(linear), adapter_dtype(linear, config)
        tensors[f"lora_A{of}"] = (config.ranks[0] if config.shared_a else R, D_in), dtype
        tensors[f"lora_B{of}"] = (R, D_out), dtype
    router = accumulator(dtype)  # its updates are too small for bf16
    tensors |= {
        name: (spec.shape, router) for name, spec in component_specs(config, *sizes).items()
    }
    return {
        name: torch.empty(shape, dtype=kind, device="meta")
        for name, (shape, kind) in tensors.items()
    }


def _beside_fused(base, config):
    R, tensors = sum(config.ranks), {}
    for name in config.target_parameters:
        _, D_in, D_out = fused.sizes(base, name)
        dtype = _dtype_beside(getattr(base, name).dtype, config)
        for key, width in zip(fused.tensor_names(name), (D_in, D_out)):
            tensors[key] = torch.empty(R, width, dtype=dtype, device="meta")
    return tensors


def component_specs(config: LoraMoeConfig, D_in: int, D_out: int) -> dict[str, TensorSpec]:
    """The tensors that router and middle require in a layer of these sizes, by name."""
    specs = dict((config.router or TokenRouter()).tensors(config, D_in, D_out))
    if config.middle is not None:
        between = config.middle.tensors(config, D_in, D_out)
        if both := specs.keys() & between.keys():
            raise ValueError(
                f"middle: expected tensor names that the router does not use, got {sorted(both)}"
            )
        specs |= between
    return specs


def device_of(base):
    """The experts' device: the base's, or the execution device if accelerate offloads the base."""
    outer = getattr(base, "_hf_hook", None)
    for hook in getattr(outer, "hooks", (outer,)):
        device = getattr(hook, "execution_device", None)
        if device is not None and getattr(hook, "offload", False):
            return torch.device(device)
    tensors = itertools.chain(base.parameters(), base.buffers())
    return next((t.device for t in tensors), torch.get_default_device())
