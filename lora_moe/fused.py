"""Fused experts of MoE models in transformers: one weight for all experts per linear layer.

    gate_up_proj, or up_proj without a gate   (E, D_out, D_in), or (E, D_in, D_out) if is_transposed
    down_proj                                 the same; plus biases (E, D_out) if has_bias

Every class with transformers' experts interface (`use_experts_implementation`) is such a module.  It has the
attributes is_transposed, has_bias and has_gate, and is called with tokens, and with ids and weights from the
model's router.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from .config import LoraMoeConfig

_SAYS = ("num_experts", "is_transposed", "has_bias", "has_gate", "_apply_gate")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# values of config._experts_implementation that compute the same function from these weights
_KNOWN = (None, "eager", "batched_mm", "grouped_mm", "deepgemm", "sonicmoe")


def is_fused(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in _SAYS)


def fused_names(module: nn.Module) -> tuple[str, str]:
    """Names of the module's weights, in order of computation."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def sizes(module: nn.Module, name: str) -> tuple[int, int, int]:
    """(E, D_in, D_out) of one of its weights."""
    E, rows, columns = getattr(module, name).shape
    return (E, rows, columns) if module.is_transposed else (E, columns, rows)


def config_at(module: nn.Module, config: LoraMoeConfig, names=None) -> LoraMoeConfig:
    """The configuration with the module's number of experts and its weights as target_parameters.

    Raises:
        ValueError: if num_experts differs, or target_parameters matches none of the weights.
    """
    own = {target.rpartition(".")[2] for target in config.target_parameters}
    names = [name for name in fused_names(module) if name in (own if names is None else names)]
    if not names:
        raise ValueError(
            f"target_parameters: expected some of {fused_names(module)}, got {config.target_parameters}"
        )
    E = sizes(module, names[0])[0]
    if config.num_experts not in (None, E):
        raise ValueError(
            f"num_experts: expected {E}, the number of the model's own experts, or None,"
            f" got {config.num_experts}"
        )
    return dataclasses.replace(config, num_experts=E, target_parameters=tuple(names))


def tensor_names(name: str) -> tuple[str, str]:
    """Names of the layer's parameters lora_A (E r, D_in) and lora_B (E r, D_out) for a weight."""
    return f"lora_A_{name}", f"lora_B_{name}"


def why_unfit(module: nn.Module, names=None) -> str | None:
    """Why the named parameters, by default all fused weights, cannot have a LoRA per expert; or None."""
    kind = type(module).__name__
    if not is_fused(module):
        return f"a {kind} has no experts with transformers' experts interface"
    other = [name for name in names or () if name not in fused_names(module)]
    if other:
        return f"{', '.join(other)} is not a fused weight of a {kind}: {' and '.join(fused_names(module))}"
    weights = [getattr(module, name, None) for name in fused_names(module)]
    for weight in weights:
        plain = isinstance(weight, nn.Parameter) and type(weight.data) is torch.Tensor
        if not plain or weight.ndim != 3 or weight.dtype not in _DTYPES:
            dtype = getattr(weight, "dtype", type(weight).__name__)
            return f"the weights of a {kind} are quantized ({dtype}); load the model in bfloat16"
    if getattr(module, "_is_expert_parallel", False):
        return "it uses expert parallelism; shard with FSDP2 instead"
    if any(getattr(h, "offload", False) for h in _hooks(module)):
        return "accelerate offloads its weights, which are read outside of the hook; keep them on a device"
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation not in _KNOWN:
        return f"experts_implementation={implementation!r} is not supported; load the model with 'grouped_mm'"
    return None


def _hooks(module):
    outer = getattr(module, "_hf_hook", None)
    return getattr(outer, "hooks", (outer,))
