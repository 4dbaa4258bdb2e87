"""warm_up: compiles a model's kernels before its first batch; on a GPU each takes seconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .components import Batch
from .context import NOTHING
from .fused import fused_names, sizes
from .layers import LoraMoeLinear
from .linear import last_of_ffn, linear_features
from .mlp import LoraMoeMLP
from .native_experts import LoraMoeExperts
from .routing import Routing

# one per size class of plans and tiles
TOKENS = (1, *(n * 2**i for i in range(4, 12) for n in (2, 3)), 8192)


def warm_up(model: nn.Module, *, tokens: Sequence[int] = TOKENS, backward: bool = True) -> int:
    """Run every kind of expert layer in the model once on zeros, forward and backward.

    Layers with equal sizes, configuration, dtypes and device share kernels, so only one of them runs.
    Parameters, gradients and the layers' recorded routing do not change.

    Args:
        model: a model with experts, on its final device and in its final dtype.
        tokens: numbers of tokens to run; the default has one per size class, since other numbers in a
            class do not recompile.
        backward: False for inference only.
    Returns:
        The number of kinds of layers.
    Raises:
        ValueError: if the model has no experts.
    """
    kinds = {}
    for layer in model.modules():
        if isinstance(layer, tuple(_RUNS)) and layer.config.middle is None:
            parameters = layer.adapter_state().values()
            shapes = *((p.shape, p.dtype, p.device) for p in parameters), layer.config.top_k
            kinds.setdefault((shapes, str(layer.config), layer.frozen), layer)
    if not kinds:
        raise ValueError("model: expected a model with experts (see inject), got none")
    for layer in kinds.values():
        run = next(run for kind, run in _RUNS.items() if isinstance(layer, kind))
        for T in tokens:
            run(layer, T, backward)
    return len(kinds)


def _run(layer, T, backward):
    empty = {"dtype": _dtype_of(layer.base_layer), "device": layer.lora_A.device}
    x = torch.zeros(T, layer.in_features, **empty, requires_grad=backward)
    base = torch.zeros(T, layer.out_features, **empty)
    # the experts' kernels do not depend on the router
    override = None if layer.components is None else _first_experts(layer, x)
    with torch.set_grad_enabled(backward):
        y, _ = layer.add_experts(x, base, override)
    if backward:
        parameters = [p for p in (layer.lora_A, layer.lora_B) if p.requires_grad]
        torch.autograd.grad(y, [x, *parameters], torch.zeros_like(y))


def _run_ffn(layer, T, backward):
    empty = {"dtype": _dtype_of(layer.base_layer), "device": layer.device}
    x = torch.zeros(T, layer.width, **empty, requires_grad=backward)
    last, K = last_of_ffn(layer.base_layer), layer.config.top_k
    with torch.set_grad_enabled(backward):
        routing = _first_experts(layer, x)
        if layer.components is None:
            tensors = {name: getattr(layer, name) for name in layer.own}
            routing = layer.router.route(x, tensors, Batch(layer, NOTHING))
        for name in layer.config.target_modules:
            D_in, D_out = linear_features(layer.base_layer.get_submodule(name))
            shape = (T, K, D_in) if name == last else (T, D_in)
            v, base = (
                torch.zeros(shape, **empty, requires_grad=backward),
                torch.zeros(T, D_out, **empty),
            )
            y = layer.adapt(name, v, base, routing, "sum" if name == last else "apart")
            if backward:
                parameters = [p for p in layer.pair(name) if p.requires_grad]
                torch.autograd.grad(y, [v, *parameters], torch.zeros_like(y))


def _run_experts(layer, T, backward):
    base, E = layer.base_layer, layer.config.num_experts
    K = min(getattr(base.config, "num_experts_per_tok", 1), E)
    D = sizes(base, fused_names(base)[0])[1]
    x = torch.zeros(T, D, dtype=_dtype_of(base), device=layer.device, requires_grad=backward)
    ids = torch.arange(K, device=x.device).expand(T, -1)
    with torch.set_grad_enabled(backward):
        y, _ = layer.mix(x, ids, torch.ones_like(ids, dtype=x.dtype))
    if backward:
        parameters = [p for pair in layer.pairs() for p in pair if p.requires_grad]
        torch.autograd.grad(y, [x, *parameters], torch.zeros_like(y))


def _first_experts(layer, x):
    ids = torch.arange(layer.config.top_k, device=x.device).expand(len(x), -1)
    return Routing.from_ids(ids, num_experts=layer.config.num_experts)


def _dtype_of(base):
    """Dtype of the base's floating-point weights, bf16 if they are quantized."""
    dtypes = (p.dtype for p in base.parameters() if p.dtype.is_floating_point)
    return next(dtypes, torch.bfloat16)


_RUNS = {LoraMoeLinear: _run, LoraMoeMLP: _run_ffn, LoraMoeExperts: _run_experts}
