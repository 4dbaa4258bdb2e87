"""Compile a model's kernels before its first batch: on a GPU each takes seconds the first time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .layers import LoraMoeLinear
from .routing import Routing

TOKENS = (1, 1024, 8192)  # one of every size class that plans and tiles know


def warm_up(model: nn.Module, *, tokens: Sequence[int] = TOKENS, backward: bool = True) -> int:
    """Run every kind of LoraMoeLinear in the model once, on zeros, forward and backward.

    Layers of the same sizes, configuration, dtypes and device share their kernels, so one stands for all.
    Parameters, their gradients and the layers' routing stay as they are.

    Args:
        model: with layers of ours in it, where it will run and in its dtype.
        tokens: numbers of tokens to run; the default has one of every size class, since within a class
            another number never compiles anew.
        backward: False where the model will only infer.
    Returns:
        How many kinds of layers there were.
    Raises:
        ValueError: the model has no such layer.
    """
    kinds = {}
    for layer in model.modules():
        if isinstance(layer, LoraMoeLinear) and layer.config.middle is None:
            parameters = layer.adapter_state().values()
            shapes = *((p.shape, p.dtype, p.device) for p in parameters), layer.config.top_k
            kinds.setdefault((shapes, str(layer.config), layer.frozen), layer)
    if not kinds:
        raise ValueError("model: expected one with LoraMoeLinear layers, see lora_moe.inject")
    for layer in kinds.values():
        for T in tokens:
            _run(layer, T, backward)
    return len(kinds)


def _run(layer, T, backward):
    dtype = layer.weight.dtype if layer.weight.dtype.is_floating_point else torch.bfloat16
    empty = {"dtype": dtype, "device": layer.lora_A.device}
    x = torch.zeros(T, layer.in_features, **empty, requires_grad=backward)
    base = torch.zeros(T, layer.out_features, **empty)
    E, given = layer.config.num_experts, None
    if layer.parts is not None:  # whoever decides, the experts' kernels are the same
        ids = torch.arange(layer.config.top_k, device=x.device).expand(T, -1)
        given = Routing.from_ids(ids, num_experts=E)
    with torch.set_grad_enabled(backward):
        y, _ = layer.add_experts(x, base, given)
    if backward:
        parameters = [p for p in (layer.lora_A, layer.lora_B) if p.requires_grad]
        torch.autograd.grad(y, [x, *parameters], torch.zeros_like(y))
