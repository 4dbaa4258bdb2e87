"""A MoE model's own experts as transformers fuses them: one weight of all experts for each linear map.

    gate_up_proj, or up_proj without a gate   (E, D_out, D_in), or (E, D_in, D_out) if is_transposed
    down_proj                                 the same; beside them, if has_bias, biases (E, D_out)

Every class behind transformers' experts interface (`use_experts_implementation`) is such a module, whatever
its model: it says of itself is_transposed, has_bias and has_gate, and is called with the tokens, the ids and
the weights that the model's router decided.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from .config import LoraMoeConfig

_SAYS = ("num_experts", "is_transposed", "has_bias", "has_gate", "_apply_gate")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# of config._experts_implementation: these compute one function from these weights
_KNOWN = (None, "eager", "batched_mm", "grouped_mm", "deepgemm", "sonicmoe")


def is_fused(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in _SAYS)


def fused_names(module: nn.Module) -> tuple[str, str]:
    """The weights of such a module, in the order of the computation."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def sizes(module: nn.Module, name: str) -> tuple[int, int, int]:
    """(E, D_in, D_out) of one of its weights."""
    E, rows, columns = getattr(module, name).shape
    return (E, rows, columns) if module.is_transposed else (E, columns, rows)


def config_at(module: nn.Module, config: LoraMoeConfig, names=None) -> LoraMoeConfig:
    """The configuration with the module's number of experts, and the weights that it names there.

    Raises:
        ValueError: it says another number of experts, or names none of the weights.
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
    """Of lora_A (E r, D_in) and lora_B (E r, D_out) beside a weight, as parameters of the layer."""
    return f"lora_A_{name}", f"lora_B_{name}"


def why_unfit(module: nn.Module, names=None) -> str | None:
    """Why these of its parameters, or its fused weights, cannot take a LoRA per expert; or None."""
    kind = type(module).__name__
    if not is_fused(module):
        return f"a {kind} holds no experts of transformers' experts interface"
    other = [name for name in names or () if name not in fused_names(module)]
    if other:
        return f"{', '.join(other)} is no fused weight of a {kind}: {' and '.join(fused_names(module))}"
    weights = [getattr(module, name, None) for name in fused_names(module)]
    for weight in weights:
        plain = isinstance(weight, nn.Parameter) and type(weight.data) is torch.Tensor
        if not plain or weight.ndim != 3 or weight.dtype not in _DTYPES:
            dtype = getattr(weight, "dtype", type(weight).__name__)
            return f"the weights of a {kind} are quantized ({dtype}): load the model in bfloat16"
    if getattr(module, "_is_expert_parallel", False):
        return "expert parallelism spreads its experts: shard with FSDP2 instead"
    if any(getattr(h, "offload", False) for h in _hooks(module)):
        return "accelerate offloads its weights, which are read outside of its hook: keep them on a device"
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation not in _KNOWN:
        return f"experts_implementation={implementation!r} is not known: load it with 'grouped_mm'"
    return None


def _hooks(module):
    outer = getattr(module, "_hf_hook", None)
    return getattr(outer, "hooks", (outer,))
