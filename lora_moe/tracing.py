"""Shapes of what the operators return, for tracing, and operands that no operator takes.

A call whose operands lie on several devices, or are sparse, quantized or nested, reaches none of the
kernels: PyTorch's table sends it to a function of this file, and that raises.  So nothing can read memory
that nobody wrote, whoever calls.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts.
"""

from __future__ import annotations

import torch

from .plan import saved_ranks
from .reference import accumulator

# Keys of PyTorch's table that come before the kernels' own when an operand has them.
REFUSED_KEYS = (
    *("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "MkldnnCPU"),
    *("QuantizedCPU", "QuantizedCUDA", "NestedTensorCPU", "NestedTensorCUDA"),
)


def on_one_device(name, function):
    """`function` with the operands' devices compared first; a mixed call of real tensors ends here too."""

    def run(*args):
        check_operands(name, args)
        return function(*args)

    return run


def refusing(name):
    """In place of a kernel, for operands of which one is not dense."""

    def run(*args):
        check_operands(name, args)
        raise TypeError(f"lora_moe::{name}: expected dense tensors")

    return run


def check_operands(operator, args):
    """Raises unless all tensors are dense and on the first one's device."""
    names = [a.name for a in getattr(torch.ops.lora_moe, operator).default._schema.arguments]
    tensors = [
        (name, t)
        for name, given in zip(names, args, strict=True)
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


def _keep(grad, needed):
    return grad if needed else grad.new_empty(0)


def router_topk(x, w, bias, router_bias, top_k, gate, renormalize, top_p, threshold):
    T, E = x.shape[0], w.shape[0]
    return (
        x.new_empty((T, top_k), dtype=torch.int32),
        _acc(x, T, top_k),
        _acc(x, T, E),
        _acc(x, E),
        _acc(x, T),
        x.new_empty((E,), dtype=torch.int64),
    )


def route_logits(logits, bias, top_k, gate, renormalize, top_p, threshold):
    T, E = logits.shape
    return (
        logits.new_empty((T, top_k), dtype=torch.int32),
        logits.new_empty((T, top_k)),
        logits.new_empty((E,)),
        logits.new_empty((T,)),
        logits.new_empty((E,), dtype=torch.int64),
    )


def router_topk_backward(
    dweights, dlogits, dmean_prob, dlse, indices, weights, logits, gate, renormalize
):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def shrink(x, a, w):
    T = x.shape[0]
    return _acc(x, T, a.shape[0]), _acc(x, T, 0 if w is None else w.shape[0])


def expand(h, b, h2, b2, base, dtype):
    return h.new_empty((h.shape[0], b.shape[1]), dtype=dtype)


def wgrad(h, x):
    return h.new_empty((h.shape[1], x.shape[1]))


def grouped_lora(x, a, b, base, indices, weights, scaling, offsets, shared_a, slots, plan):
    T, K = indices.shape
    width = saved_ranks(plan, offsets, K, shared_a)
    return x.new_empty((T * K if slots == "apart" else T, b.shape[1])), _acc(x, T, width)


def routed_lora(x, w, a, b, base, bias, router_bias, scaling, offsets, shared_a, top_k, *rest):
    *_, plan = rest
    routing = router_topk(x, w, bias, router_bias, top_k, *rest[:-1])
    y, s = grouped_lora(x, a, b, base, *routing[:2], scaling, offsets, shared_a, "none", plan)
    return y, *routing, s


def routed_lora_banks(x, w, a, b, base, *rest):
    return x.new_empty(base.shape)


def _backward(x, dw, a, b, need_x, need_router, need_a, need_b):
    grads = (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        dw,
        a.new_empty(a.shape),
        b.new_empty(b.shape),
    )
    return tuple(map(_keep, grads, (need_x, need_router, need_a, need_b)))


def grouped_lora_backward(
    dy, x, a, b, s, indices, weights, scaling, offsets, shared_a, slots, frozen, *needs
):
    return _backward(x, torch.empty_like(weights), a, b, *needs[:4])


def routed_lora_backward(dy, dweights, dlogits, dmean_prob, dlse, x, w, a, b, *rest):
    *needs, need_router_bias, _plan = rest[-6:]
    drouter_bias = _keep(_acc(x, w.shape[0]), need_router_bias)
    return *_backward(x, w.new_empty(w.shape), a, b, *needs), drouter_bias
