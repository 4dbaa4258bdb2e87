"""The autograd.Functions: forward and backward call one operator each and save nothing of size D_out.

Parameters may have a wider dtype than x (fp32 adapters, bf16 x): the operators round them to x's dtype for
the products, and gradients are summed in fp32 and returned in the parameter's dtype.  An incoming gradient
may be None, expanded, transposed or a slice; it is made contiguous here for every backend.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts.
"""

from __future__ import annotations

import functools

import torch
from torch.autograd import Function

from .operands import dense, rounded, router_bias_operand, router_operand, rows_contiguous

_ops = torch.ops.lora_moe


# --- derivatives of first order only -------------------------------------------------------------


def once(backward):
    """Decorate backward(ctx, saved, *grads) so that differentiating its results raises.

    create_graph=True alone does not raise, since Hugging Face and GAN code sets it for other layers.
    PyTorch's once_differentiable only checks the incoming gradients, so a second derivative with respect
    to a parameter would be silently missing.
    """

    @functools.wraps(backward)
    def run(ctx, *grads):
        saved = ctx.saved_tensors  # read once: a checkpoint returns them only once
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results
        sources = [t for t in (*saved, *grads) if t is not None and t.requires_grad]
        new = [g for g in results if g is not None and not any(g is given for given in grads)]
        if not sources or not new:
            return results
        guarded = iter(_DifferentiatedTwice.apply(len(new), *new, *sources))
        return tuple(next(guarded) if any(g is n for n in new) else g for g in results)

    return run


class _DifferentiatedTwice(Function):
    """Return the first `number` tensors unchanged; for autograd they depend on the others."""

    @staticmethod
    def forward(ctx, number, *tensors):
        return tensors[:number]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "lora_moe: second derivatives (double backward) are not implemented for the experts and the"
            " router; use the plain PyTorch functions in lora_moe.reference, which support them"
        )


# --- the functions -------------------------------------------------------------------------------


class RouterTopK(Function):
    """indices, weights, logits, mean_prob, lse, counts = apply(
    x, w, bias, router_bias, top_k, gate, renormalize, top_p, threshold)
    """

    @staticmethod
    def forward(ctx, x, w, bias, router_bias, top_k, gate, renormalize, *sparsity):
        operands = (
            rows_contiguous(x),
            router_operand(w, x),
            bias,
            router_bias_operand(router_bias, x),
        )
        out = _ops.router_topk(*operands, top_k, gate, renormalize, *sparsity)
        indices, weights, logits, _, _, counts = out
        ctx.save_for_backward(x, w, indices, weights, logits)
        ctx.bias_dtype = None if router_bias is None else router_bias.dtype
        ctx.options = gate, renormalize
        ctx.mark_non_differentiable(indices, counts)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once
    def backward(ctx, saved, _indices, dweights, dlogits, dmean_prob, dlse, _counts):
        aux, need_router_bias = (dweights, dlogits, dmean_prob, dlse), ctx.needs_input_grad[3]
        dx, dw, drouter_bias = _router_backward(ctx, aux, *saved, need_router_bias)
        return dx, dw, None, drouter_bias, *(None,) * 5


def _router_backward(ctx, aux, x, w, indices, weights, logits, need_router_bias):
    """dx = dlogits W,  dW = dlogits^T x,  drouter_bias = dlogits^T 1, each only when needed."""
    dlogits = _ops.router_topk_backward(*dense(*aux), indices, weights, logits, *ctx.options)
    need_x, need_router = ctx.needs_input_grad[:2]
    dx = dw = drouter_bias = None
    if need_x:
        dx = _ops.expand(dlogits, router_operand(w, x), None, None, None, x.dtype)
    if need_router:
        dw = _ops.wgrad(dlogits, rows_contiguous(x)).to(w.dtype)
    if need_router_bias:
        drouter_bias = _sum_of_rows(dlogits).to(ctx.bias_dtype)
    return dx, dw, drouter_bias


def _sum_of_rows(v):
    """v^T 1, in the same fixed order as other sums over tokens; fp16 represents 1 and avoids TF32."""
    exact = torch.float64 if v.dtype == torch.float64 else torch.float16
    return _ops.wgrad(v, v.new_ones((1, 1), dtype=exact).expand(len(v), 1)).view(-1)


class RouteLogits(Function):
    """indices, weights, mean_prob, lse, counts = apply(
    logits, bias, top_k, gate, renormalize, top_p, threshold)
    """

    @staticmethod
    def forward(ctx, logits, bias, top_k, gate, renormalize, *sparsity):
        out = _ops.route_logits(logits.contiguous(), bias, top_k, gate, renormalize, *sparsity)
        indices, weights, _, _, counts = out
        ctx.save_for_backward(indices, weights, logits)
        ctx.options = gate, renormalize
        ctx.mark_non_differentiable(indices, counts)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once
    def backward(ctx, saved, _indices, dweights, dmean_prob, dlse, _counts):
        aux = dense(dweights, None, dmean_prob, dlse)
        return _ops.router_topk_backward(*aux, *dense(*saved), *ctx.options), *(None,) * 6


class GroupedLora(Function):
    """y = apply(
    x, lora_A, lora_B, base, indices, weights, scaling, offsets, shared_a, slots, frozen, plan,
    base_weight)
    """

    @staticmethod
    def forward(ctx, x, a, b, base, indices, weights, scaling, *options):
        *experts, frozen, plan, w0 = options  # experts: offsets, shared_a, slots
        rows, routing = map(rows_contiguous, (x, a, b, base)), (indices, weights, scaling)
        y, s = _ops.grouped_lora(*rows, *routing, *experts, plan)
        ctx.save_for_backward(x, a, b, s, *routing, w0)
        ctx.experts, ctx.frozen, ctx.plan = experts, frozen, plan
        ctx.base_rows = None if base is None else len(base)
        return y

    @staticmethod
    @once
    def backward(ctx, saved, dy):
        x, a, b, *rest, w0 = saved  # rest: s, indices, weights, scaling
        need_x, need_a, need_b, need_base, _, need_weights = ctx.needs_input_grad[:6]
        needs, rows = (need_x, need_weights, need_a, need_b), map(rows_contiguous, (dy, x, a, b))
        grads = _ops.grouped_lora_backward(*rows, *rest, *ctx.experts, ctx.frozen, *needs, ctx.plan)
        dx, dweights, da, db = _needed(grads, needs)
        dbase = _base_gradient(dy, ctx.base_rows) if need_base else None
        return _with_base(dx, dy, w0), da, db, dbase, None, dweights, *(None,) * 7


def _needed(grads, needs):
    """Operators return an empty tensor for gradients that are not needed; autograd expects None."""
    return [grad if need else None for grad, need in zip(grads, needs)]


def _with_base(dx, dy, w0):
    """dx + dy W0 in place, rounded once more; this saves autograd's separate addition."""
    return dx if dx is None or w0 is None else dx.addmm_(dy, w0)


def _base_gradient(dy, rows):
    """dy, summed over the slots that share a row of the base."""
    if len(dy) == rows:
        return dy
    slots = dy.view(rows, -1, dy.shape[1])
    # adding two numbers needs no wider dtype, which sum() would use and which takes three times as long
    return slots[:, 0] + slots[:, 1] if slots.shape[1] == 2 else slots.sum(1)


class RoutedLora(Function):
    """y, indices, weights, logits, mean_prob, lse, counts = apply(
    x, router_weight, lora_A, lora_B, base, bias, router_bias, scaling, offsets, shared_a, top_k,
    gate, renormalize, top_p, threshold, frozen, plan, base_weight)
    """

    @staticmethod
    def forward(
        ctx, x, w, a, b, base, bias, router_bias, scaling, offsets, shared_a, top_k, gate,
        renormalize, top_p, threshold, frozen, plan, w0,
    ):  # fmt: skip
        rows = rows_contiguous(x), router_operand(w, x), *map(rows_contiguous, (a, b, base))
        biases, experts = (bias, router_bias_operand(router_bias, x)), (scaling, offsets, shared_a)
        router = top_k, gate, renormalize, top_p, threshold
        *out, s = _ops.routed_lora(*rows, *biases, *experts, *router, plan)
        _, indices, weights, logits, _, _, counts = out
        ctx.save_for_backward(x, w, a, b, s, indices, weights, logits, scaling, w0)
        ctx.bias_dtype = None if router_bias is None else router_bias.dtype
        ctx.options = gate, renormalize
        ctx.experts = offsets, shared_a, frozen, plan
        ctx.mark_non_differentiable(indices, counts)
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @once
    def backward(ctx, saved, dy, _indices, dweights, dlogits, dmean_prob, dlse, _counts):
        x, w, a, b, s, *routing, scaling, w0 = saved  # routing: indices, weights, logits
        aux = dweights, dlogits, dmean_prob, dlse
        *needs, need_base, _, need_router_bias = ctx.needs_input_grad[:7]
        if dy is None:  # only the routing reached the loss
            dx, dw, drouter_bias = _router_backward(ctx, aux, x, w, *routing, need_router_bias)
            return dx, dw, *(None,) * 4, drouter_bias, *(None,) * 11
        offsets, shared_a, frozen, plan = ctx.experts
        rows = rows_contiguous(x), router_operand(w, x), *map(rows_contiguous, (a, b))
        needs = *needs, need_router_bias
        grads = _ops.routed_lora_backward(
            rows_contiguous(dy), *dense(*aux), *rows, s, *routing, scaling, offsets, shared_a,
            *ctx.options, frozen, *needs, plan,
        )  # fmt: skip
        dx, dw, da, db, drouter_bias = _needed(grads, needs)
        dw = None if dw is None else dw.to(w.dtype)
        drouter_bias = None if drouter_bias is None else drouter_bias.to(ctx.bias_dtype)
        dbase = dy if need_base else None
        return _with_base(dx, dy, w0), dw, da, db, dbase, None, drouter_bias, *(None,) * 11


class Shrink(Function):
    """S, logits = apply(x, lora_A, router_weight or None)"""

    @staticmethod
    def forward(ctx, x, a, w):
        ctx.save_for_backward(x, a, w)
        ctx.set_materialize_grads(False)
        return _ops.shrink(rows_contiguous(x), *rounded(x, a), router_operand(w, x))

    @staticmethod
    @once
    def backward(ctx, saved, ds, dlogits):
        x, a, w = saved
        need_x, need_a, need_router = ctx.needs_input_grad
        ds, dlogits = dense(ds, dlogits)
        pairs = [] if ds is None else [(ds, *rounded(x, a))]
        if w is not None and dlogits is not None:
            pairs.append((dlogits, router_operand(w, x)))
        dx = da = dw = None
        if need_x and pairs:
            second = pairs[1] if len(pairs) == 2 else (None, None)
            dx = _ops.expand(*pairs[0], *second, None, x.dtype)
        if need_a and ds is not None:
            da = _ops.wgrad(ds, rows_contiguous(x)).to(a.dtype)
        if need_router and dlogits is not None:
            dw = _ops.wgrad(dlogits, rows_contiguous(x)).to(w.dtype)
        return dx, da, dw


class Expand(Function):
    """y = apply(H, lora_B, base or None, dtype of y)"""

    @staticmethod
    def forward(ctx, h, b, base, dtype):
        ctx.save_for_backward(h, b)
        b, base = map(rows_contiguous, (b.to(dtype), base))
        return _ops.expand(h.contiguous(), b, None, None, base, dtype)

    @staticmethod
    @once
    def backward(ctx, saved, dy):
        h, b = saved
        need_h, need_b, need_base, _ = ctx.needs_input_grad
        dh = db = None
        rows = rows_contiguous(dy)
        if need_h:
            dh, _ = _ops.shrink(rows, rows_contiguous(b.to(dy.dtype)), None)
        if need_b:
            db = _ops.wgrad(h.contiguous(), rows).to(b.dtype)
        return dh, db, dy if need_base else None, None
