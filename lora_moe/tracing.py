"""Fake implementations of the operators for tracing, and checks of unsupported operands.

PyTorch dispatches calls with operands on several devices, or with sparse, quantized or nested operands, to
functions of this file, which raise.  So no kernel reads invalid memory, even if an operator is called
directly.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts.
"""

from __future__ import annotations

import functools
import inspect

import torch

from .plan import saved_ranks
from .reference import accumulator

# Dispatch keys with precedence over the kernels' keys.
REFUSED_KEYS = (
    *("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "MkldnnCPU"),
    *("QuantizedCPU", "QuantizedCUDA", "NestedTensorCPU", "NestedTensorCUDA"),
)


@functools.cache
def argument_names(operator: str) -> list[str]:
    """Argument names from the operator's schema."""
    schema = getattr(torch.ops.lora_moe, operator).default._schema
    return [argument.name for argument in schema.arguments]


@functools.cache
def _names_of(function):
    return tuple(inspect.signature(function).parameters)


def call(function, v):
    """Call the function with the operator arguments v that it names."""
    return function(*(v[name] for name in _names_of(function)))


def by_name(operator, function):
    """Wrap `function`, which names the arguments that it reads, to accept all operator arguments."""
    names = argument_names(operator)
    return lambda *args: call(function, dict(zip(names, args)))


def on_one_device(name, function):
    """Wrap `function` to check the operands first; calls with mixed devices end up here too."""

    def run(*args):
        check_operands(name, args)
        return function(*args)

    return run


def refusing(name):
    """A kernel that raises, for operands that are not all dense."""

    def run(*args):
        check_operands(name, args)
        raise TypeError(f"lora_moe::{name}: expected dense tensors")

    return run


def check_operands(operator, args):
    """Raise unless all tensors are dense and on the first one's device."""
    tensors = [
        (name, t)
        for name, given in zip(argument_names(operator), args, strict=True)
        for t in (given if isinstance(given, list) else [given])
        if isinstance(t, torch.Tensor)
    ]
    first, x = tensors[0]
    for name, t in tensors:
        if t.layout != torch.strided or t.is_quantized or t.is_nested:
            kind = "quantized" if t.is_quantized else "nested" if t.is_nested else t.layout
            raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like {first}, got {t.device}")


def _acc(x, *shape):
    return x.new_empty(shape, dtype=accumulator(x.dtype))


def keep(grad, needed):
    return grad if needed else grad.new_empty(0)


# --- fake results, by operator name, from the arguments that determine the shapes ------------------


def router_topk(x, w, top_k):
    T, E = x.shape[0], w.shape[0]
    return (
        x.new_empty((T, top_k), dtype=torch.int32),
        _acc(x, T, top_k),
        _acc(x, T, E),
        _acc(x, E),
        _acc(x, T),
        x.new_empty((E,), dtype=torch.int64),
    )


def route_logits(logits, top_k):
    T, E = logits.shape
    return (
        logits.new_empty((T, top_k), dtype=torch.int32),
        logits.new_empty((T, top_k)),
        logits.new_empty((E,)),
        logits.new_empty((T,)),
        logits.new_empty((E,), dtype=torch.int64),
    )


def router_topk_backward(logits):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def shrink(x, a, w):
    T = x.shape[0]
    return _acc(x, T, a.shape[0]), _acc(x, T, 0 if w is None else w.shape[0])


def expand(h, b, dtype):
    return h.new_empty((h.shape[0], b.shape[1]), dtype=dtype)


def wgrad(h, x):
    return h.new_empty((h.shape[1], x.shape[1]))


def grouped_lora(x, b, indices, offsets, shared_a, slots, plan):
    T, K = indices.shape
    width = saved_ranks(plan, offsets, K, shared_a)
    return x.new_empty((T * K if slots == "apart" else T, b.shape[1])), _acc(x, T, width)


def routed_lora(x, w, b, offsets, shared_a, top_k, plan):
    routing = router_topk(x, w, top_k)
    y, s = grouped_lora(x, b, routing[0], offsets, shared_a, "none", plan)
    return y, *routing, s


def routed_lora_banks(x, base):
    return x.new_empty(base.shape)


def grouped_lora_backward(x, a, b, weights, need_x, need_router, need_a, need_b):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    grads = dx, torch.empty_like(weights), a.new_empty(a.shape), b.new_empty(b.shape)
    return tuple(map(keep, grads, (need_x, need_router, need_a, need_b)))


def routed_lora_backward(x, w, a, b, need_x, need_router, need_a, need_b, need_router_bias):
    dw = w.new_empty(w.shape)
    grads = grouped_lora_backward(x, a, b, dw, need_x, need_router, need_a, need_b)
    return *grads, keep(_acc(x, w.shape[0]), need_router_bias)
