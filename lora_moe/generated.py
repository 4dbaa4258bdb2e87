"""fill_expert: writes a LoRA's weights, for example from a generator network, into one expert."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as brief

import torch
from torch import nn

from . import peft_format
from .config import FFN
from .placement import expert_ids
from .safefile import raise_all
from .sharded import at_rest, fill, gathered, plain_path, unwrapped
from .steering import layers_of


@torch.no_grad()
def fill_expert(
    model: nn.Module,
    expert: int,
    state_dict: Mapping[str, torch.Tensor],
    *,
    scale: float | None = None,
) -> None:
    """Write A (r, D_in) and B (D_out, r) of a LoRA into one expert of every layer.

        lora_A[rows of e] = A,   lora_B[rows of e] = (scale / s_e) B^T,   so that  s_e B_e A_e = scale B A

    The state dict has PEFT's keys, <module path>.lora_A.weight and <module path>.lora_B.weight, with or
    without the prefix "base_model.model.".  The output of ICM-LoRA's conditional variational autoencoder
    for a task, split into matrices, is such a dict.

    Args:
        model: a model with experts; if it is sharded, every rank must call this.
        expert: id of the expert.
        state_dict: both tensors of every layer; with shared_a only lora_B, since the experts share A.
        scale: alpha / r with which the weights were trained; None means the layer's own s_e.
    Raises:
        ValueError: if a tensor is missing, unknown, of another shape or not finite (all are listed), or
            expert or scale is invalid.  Nothing is changed.
    Source:
        ICM-LoRA, arXiv 2501.17635, generates the parameters; the PEFT keys are this package's choice.
    """
    whole, model = model, unwrapped(model)
    layers = {plain_path(path): layer for path, layer in layers_of(model).items()}
    for path, layer in layers.items():
        if layer.config.target_parameters or layer.config.placement == FFN:
            kind = type(layer.base_layer).__name__
            raise ValueError(f"model: expected experts on linear modules, got {path}, a {kind}")
    wanted = {}  # key: (layer, name, shape, factor)
    for path, layer in layers.items():
        e = _one(expert, layer)
        r, s = layer.config.ranks[e], layer.scales[e]
        if scale is not None and not (0 <= scale < float("inf") and s > 0):
            raise ValueError(
                f"scale: expected a finite number for {path} with scale {s}, got {scale}"
            )
        factor = 1.0 if scale is None else scale / s
        own = {"lora_B": ((layer.out_features, r), factor)}
        if not layer.config.shared_a:
            own["lora_A"] = (r, layer.in_features), 1.0
        wanted |= {f"{path}.{n}.weight".lstrip("."): (layer, n, *how) for n, how in own.items()}
    given = {peft_format.module_path(key): tensor for key, tensor in state_dict.items()}
    problems = [f"{key}: missing" for key in wanted if key not in given]
    problems += [f"{ascii(key)[:200]}: not in the model" for key in given if key not in wanted]
    for key in wanted.keys() & given.keys():
        problems += _misfit(key, given[key], *wanted[key])
    raise_all("state_dict: expected A and B of the expert in each layer", problems)
    with at_rest(whole, modified=True):
        for key, (layer, name, _, factor) in wanted.items():
            parameter = getattr(layer, name)
            rows = slice(*layer.offsets[(e := _one(expert, layer)) : e + 2])
            value = gathered({name: parameter})[name].clone()
            new = given[key].to(value.device, torch.float64)
            value[rows] = (new if name == "lora_A" else factor * new.T).to(value.dtype)
            fill(parameter, value)


def _one(expert, layer):
    E = layer.config.num_experts
    try:
        (e,) = expert_ids(expert, E)
    except ValueError:
        raise ValueError(f"expert: expected one id in [0, {E}), got {brief(expert)}") from None
    return e


def _misfit(key, tensor, layer, name, shape, factor):
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        kind = getattr(tensor, "dtype", type(tensor).__name__)
        return [f"{key}: expected a floating-point tensor, got {kind}"]
    if tuple(tensor.shape) != shape:
        return [f"{key}: expected {shape}, got {tuple(tensor.shape)}"]
    if not torch.isfinite((factor * tensor.double()).to(getattr(layer, name).dtype)).all():
        dtype = getattr(layer, name).dtype
        return [f"{key}: expected finite values in {dtype}, got NaN or infinity"]
    return []
