"""The autograd.Functions: forward and backward call one operator each, saving nothing of size D_out.

Parameters may be wider than x (fp32 adapters, bf16 x): the operators round them to x's dtype for the
products and return their gradients, summed in fp32, in the parameter's own dtype.

Letters: T tokens, E experts, K picked experts a token, R rank rows of all experts.
"""

from __future__ import annotations

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .reference import accumulator

_ops = torch.ops.lora_moe


def router_operand(w, x):
    """The router keeps fp32 weights beside a bf16 x: its products are always full fp32."""
    acc = accumulator(x.dtype)
    return rows_contiguous(w if w.dtype in (x.dtype, acc) else w.to(acc))


def rounded(x, *parameters):
    """Adapters as the products take them: in x's dtype, with unit stride along columns."""
    return [rows_contiguous(p.to(x.dtype)) for p in parameters]


def router_bias_operand(router_bias, x):
    return None if router_bias is None else router_bias.to(accumulator(x.dtype)).contiguous()


class RouterTopK(Function):
    """indices, weights, logits, mean_prob, lse, counts = apply(
    x, w, bias, router_bias, top_k, gate, renormalize, top_p, threshold)
    """

    @staticmethod
    def forward(ctx, x, w, bias, router_bias, top_k, gate, renormalize, *sparsity):
        out = _ops.router_topk(
            x,
            router_operand(w, x),
            bias,
            router_bias_operand(router_bias, x),
            top_k,
            gate,
            renormalize,
            *sparsity,
        )
        indices, weights, logits, _, _, counts = out
        ctx.save_for_backward(x, w, indices, weights, logits)
        ctx.bias_dtype = None if router_bias is None else router_bias.dtype
        ctx.options = gate, renormalize
        ctx.mark_non_differentiable(indices, counts)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, _indices, dweights, dlogits, dmean_prob, dlse, _counts):
        x, w, indices, weights, logits = ctx.saved_tensors
        dx, dw, drouter_bias = _router_backward(
            ctx,
            (dweights, dlogits, dmean_prob, dlse),
            x,
            w,
            indices,
            weights,
            logits,
            ctx.needs_input_grad[3],
        )
        return dx, dw, None, drouter_bias, *(None,) * 5


def _router_backward(ctx, grads, x, w, indices, weights, logits, need_router_bias):
    """dx = dlogits W,  dW = dlogits^T x,  drouter_bias = dlogits^T 1, each only when needed."""
    dlogits = _ops.router_topk_backward(*grads, indices, weights, logits, *ctx.options)
    need_x, need_w = ctx.needs_input_grad[:2]
    dx = dw = drouter_bias = None
    if need_x:
        dx = _ops.expand(dlogits, router_operand(w, x), None, None, None, x.dtype)
    if need_w:
        dw = _ops.gram(dlogits, x).to(w.dtype)
    if (
        need_router_bias
    ):  # in a fixed order, as gram promises it; fp16 holds 1, and never runs as TF32
        exact = torch.float64 if dlogits.dtype == torch.float64 else torch.float16
        ones = dlogits.new_ones((1, 1), dtype=exact).expand(len(dlogits), 1)
        drouter_bias = _ops.gram(dlogits, ones).view(-1).to(ctx.bias_dtype)
    return dx, dw, drouter_bias


class GroupedLora(Function):
    """y = apply(x, lora_A, lora_B, base, indices, weights, scaling, offsets, shared_a, frozen, plan)"""

    @staticmethod
    def forward(ctx, x, a, b, base, indices, weights, scaling, offsets, shared_a, frozen, plan):
        y, s = _ops.grouped_lora(
            x,
            *map(rows_contiguous, (a, b)),
            base,
            indices,
            weights,
            scaling,
            offsets,
            shared_a,
            plan,
        )
        ctx.save_for_backward(x, a, b, s, indices, weights, scaling)
        ctx.options = offsets, shared_a, frozen, plan
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, a, b, s, indices, weights, scaling = ctx.saved_tensors
        offsets, shared_a, frozen, plan = ctx.options
        need_x, need_a, need_b, need_base, _, need_weights = ctx.needs_input_grad[:6]
        dx, dweights, da, db = _ops.grouped_lora_backward(
            rows_contiguous(dy),
            x,
            *map(rows_contiguous, (a, b)),
            s,
            indices,
            weights,
            scaling,
            offsets,
            shared_a,
            frozen,
            need_x,
            need_weights,
            need_a,
            need_b,
            plan,
        )
        return (
            dx if need_x else None,
            da if need_a else None,
            db if need_b else None,
            dy if need_base else None,
            None,
            dweights if need_weights else None,
            *(None,) * 5,
        )


class RoutedLora(Function):
    """y, indices, weights, logits, mean_prob, lse, counts = apply(
    x, router_weight, lora_A, lora_B, base, bias, router_bias, scaling, offsets, shared_a, top_k,
    gate, renormalize, top_p, threshold, frozen, plan)
    """

    @staticmethod
    def forward(
        ctx, x, w, a, b, base, bias, router_bias, scaling, offsets, shared_a, top_k, gate,
        renormalize, top_p, threshold, frozen, plan,
    ):  # fmt: skip
        *out, s = _ops.routed_lora(
            x,
            router_operand(w, x),
            *map(rows_contiguous, (a, b)),
            base,
            bias,
            router_bias_operand(router_bias, x),
            scaling,
            offsets,
            shared_a,
            top_k,
            gate,
            renormalize,
            top_p,
            threshold,
            plan,
        )
        _, indices, weights, logits, _, _, counts = out
        ctx.save_for_backward(x, w, a, b, s, indices, weights, logits, scaling)
        ctx.bias_dtype = None if router_bias is None else router_bias.dtype
        ctx.options = gate, renormalize
        ctx.experts = offsets, shared_a, frozen, plan
        ctx.mark_non_differentiable(indices, counts)
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _indices, dweights, dlogits, dmean_prob, dlse, _counts):
        x, w, a, b, s, indices, weights, logits, scaling = ctx.saved_tensors
        aux = dweights, dlogits, dmean_prob, dlse
        need_x, need_w, need_a, need_b, need_base, _, need_router_bias = ctx.needs_input_grad[:7]
        if dy is None:  # only the routing reached the loss
            dx, dw, drouter_bias = _router_backward(
                ctx, aux, x, w, indices, weights, logits, need_router_bias
            )
            return dx, dw, *(None,) * 4, drouter_bias, *(None,) * 10
        offsets, shared_a, frozen, plan = ctx.experts
        dx, dw, da, db, drouter_bias = _ops.routed_lora_backward(
            rows_contiguous(dy),
            *aux,
            x,
            router_operand(w, x),
            *map(rows_contiguous, (a, b)),
            s,
            indices,
            weights,
            logits,
            scaling,
            offsets,
            shared_a,
            *ctx.options,
            frozen,
            need_x,
            need_w,
            need_a,
            need_b,
            need_router_bias,
            plan,
        )
        return (
            dx if need_x else None,
            dw.to(w.dtype) if need_w else None,
            da if need_a else None,
            db if need_b else None,
            dy if need_base else None,
            None,
            drouter_bias.to(ctx.bias_dtype) if need_router_bias else None,
            *(None,) * 10,
        )


class Shrink(Function):
    """S, logits = apply(x, lora_A, router_weight or None)"""

    @staticmethod
    def forward(ctx, x, a, w):
        ctx.save_for_backward(x, a, w)
        ctx.set_materialize_grads(False)
        (a,) = rounded(x, a)
        return _ops.shrink(x, a, None if w is None else router_operand(w, x))

    @staticmethod
    @once_differentiable
    def backward(ctx, ds, dlogits):
        x, a, w = ctx.saved_tensors
        need_x, need_a, need_w = ctx.needs_input_grad
        ds, dlogits = (None if g is None else g.contiguous() for g in (ds, dlogits))
        pairs = [] if ds is None else [(ds, *rounded(x, a))]
        if w is not None and dlogits is not None:
            pairs.append((dlogits, router_operand(w, x)))
        dx = da = dw = None
        if need_x and pairs:
            second = pairs[1] if len(pairs) == 2 else (None, None)
            dx = _ops.expand(*pairs[0], *second, None, x.dtype)
        if need_a and ds is not None:
            da = _ops.gram(ds, x).to(a.dtype)
        if need_w and dlogits is not None:
            dw = _ops.gram(dlogits, x).to(w.dtype)
        return dx, da, dw


class Expand(Function):
    """y = apply(H, lora_B, base or None, dtype of y)"""

    @staticmethod
    def forward(ctx, h, b, base, dtype):
        ctx.save_for_backward(h, b)
        return _ops.expand(h, rows_contiguous(b.to(dtype)), None, None, base, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, b = ctx.saved_tensors
        need_h, need_b, need_base, _ = ctx.needs_input_grad
        dh = db = None
        rows = rows_contiguous(dy)
        if need_h:
            dh, _ = _ops.shrink(rows, rows_contiguous(b.to(dy.dtype)), None)
        if need_b:
            db = _ops.gram(h, rows).to(b.dtype)
        return dh, db, dy if need_base else None, None


def rows_contiguous(t):
    """Operators want unit stride along columns; rows may be anywhere (slices, expanded gradients)."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
