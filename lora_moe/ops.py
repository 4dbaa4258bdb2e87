"""Operator schemas, and the reference implementation behind every device.

Eleven operators, all in the namespace `lora_moe`.  `backend.py` adds the kernels of one backend per
device; whatever has none runs reference.py.  Gradients live in autograd.py, outside the operators.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts, W saved columns.
Contract: x (T, D_in), base and dy (T, D_out) and the parameters have unit stride along columns; y and dy
are (T K, D_out) with slots "apart", base either, x (T K, D_in) with slots "sum", one row per slot;
w (E, D_in) has x's dtype or fp32; bias, router_bias and scaling (E,), weights (T, K), logits and every h
and S are fp32 (all fp64 when x is); indices (T, K) int32, -1 where a slot is empty.  The operators with
experts take a (R or r, D_in) and b (R, D_out) as the parameters are, round them to x's dtype for the
products, and return each parameter's gradient in its own dtype, rounded once; `shrink` and `expand` take
them in x's dtype, and what `wgrad` returns is fp32.  Gradients that are not needed come back empty, shape
(0,).
"""

from __future__ import annotations

import torch

from . import reference, tracing
from .checks import wrong_id
from .plan import SEGMENTED

_ROUTER = "int top_k, str gate, bool renormalize, float top_p, float threshold"
_EXPERTS = "Tensor scaling, int[] offsets, bool shared_a"
_ROUTING = "Tensor indices, Tensor weights"
_SAVED = "Tensor x, {w}Tensor a, Tensor b, Tensor s"
_NEEDS = "int[] frozen, bool need_x, bool need_router, bool need_a, bool need_b"
_AUX = "Tensor? dweights, Tensor? dlogits, Tensor? dmean_prob, Tensor? dlse"

VERSION = 4  # of the schemas; extensions built for another one are refused (csrc/tensors.h)

SCHEMAS = {
    # indices, weights, logits, mean_prob, lse, counts
    "router_topk": f"(Tensor x, Tensor w, Tensor? bias, Tensor? router_bias, {_ROUTER})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # the same from logits: indices, weights, mean_prob, lse, counts
    "route_logits": f"(Tensor logits, Tensor? bias, {_ROUTER})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    # the total gradient of the logits
    "router_topk_backward": f"({_AUX}, {_ROUTING}, Tensor logits, str gate, bool renormalize) -> Tensor",
    # S (T, R), logits (T, E or 0)
    "shrink": "(Tensor x, Tensor a, Tensor? w) -> (Tensor, Tensor)",
    "expand": "(Tensor h, Tensor b, Tensor? h2, Tensor? b2, Tensor? base, ScalarType dtype) -> Tensor",
    "wgrad": "(Tensor h, Tensor x) -> Tensor",
    # y, S
    "grouped_lora": f"(Tensor x, Tensor a, Tensor b, Tensor? base, {_ROUTING}, {_EXPERTS},"
    " str slots, str plan) -> (Tensor, Tensor)",
    # dx, dweights, da, db
    "grouped_lora_backward": f"(Tensor dy, {_SAVED.format(w='')}, {_ROUTING}, {_EXPERTS}, str slots,"
    f" {_NEEDS}, str plan)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    # y, indices, weights, logits, mean_prob, lse, counts, S
    "routed_lora": "(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? base, Tensor? bias,"
    f" Tensor? router_bias, {_EXPERTS}, {_ROUTER}, str plan)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # y of several layers side by side; for inference
    "routed_lora_banks": "(Tensor x, Tensor[] w, Tensor[] a, Tensor[] b, Tensor base, Tensor?[] bias,"
    " Tensor?[] router_bias, Tensor[] scaling, int[] offsets, bool shared_a, int[] starts,"
    f" {_ROUTER}, str plan) -> Tensor",
    # dx, dw, da, db, drouter_bias
    "routed_lora_backward": f"(Tensor dy, {_AUX}, {_SAVED.format(w='Tensor w, ')}, {_ROUTING},"
    f" Tensor logits, {_EXPERTS}, str gate, bool renormalize, {_NEEDS}, bool need_router_bias, str plan)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}


# --- the reference behind every device ---------------------------------------------------------


def check_ids(indices: torch.Tensor, num_experts: int) -> None:
    """On a CPU reading the ids costs nothing, so wrong ones raise; on a GPU they are masked."""
    wrong = wrong_id(indices, num_experts) if indices.device.type == "cpu" else None
    if wrong is not None:
        raise ValueError(f"indices: expected expert ids in [-1, {num_experts}), got {wrong}")


def _keep(grad, needed):
    return grad if needed else grad.new_empty(0)


def zero_frozen_rows(da, db, frozen, offsets, shared_a):
    for expert in frozen:
        rows = slice(offsets[expert], offsets[expert + 1])
        if db.numel():
            db[rows] = 0
        if da.numel() and not shared_a:
            da[rows] = 0


def _grouped_lora(x, a, b, base, indices, weights, scaling, offsets, shared_a, slots, plan):
    check_ids(indices, len(scaling))
    experts = scaling, offsets, shared_a
    if slots != "none":
        return reference.slot_lora(x, a, b, base, indices, weights, *experts, slots)
    y, s = reference.grouped_lora(x, a, b, base, indices, weights, *experts)
    return y, _saved(s, indices, offsets, shared_a, plan)


def _routed_lora(x, w, a, b, base, bias, router_bias, scaling, offsets, shared_a, *rest):
    *router, plan = rest
    *out, s = reference.routed_lora(
        x, w, a, b, base, bias, router_bias, scaling, offsets, shared_a, *router
    )
    return *out, _saved(s, out[1], offsets, shared_a, plan)


def _routed_lora_banks(
    x, w, a, b, base, bias, router_bias, scaling, offsets, shared_a, starts, *router_and_plan
):
    y = base.clone(memory_format=torch.contiguous_format)
    for i, start in enumerate(starts):
        columns = slice(start, start + b[i].shape[1])
        y[:, columns] = _routed_lora(
            x, w[i], a[i], b[i], base[:, columns], bias[i], router_bias[i], scaling[i], offsets, shared_a,
            *router_and_plan,
        )[0]  # fmt: skip
    return y


def _saved(s, indices, offsets, shared_a, plan):
    """S as the plan keeps it."""
    by_slot = plan == SEGMENTED and not shared_a
    return reference.slots_of_rows(s, indices, offsets) if by_slot else s


def _rows(s, indices, offsets, shared_a, plan):
    by_slot = plan == SEGMENTED and not shared_a
    return reference.rows_of_slots(s, indices, offsets) if by_slot else s


def _backward(grads, offsets, shared_a, frozen, need_x, need_router, need_a, need_b):
    dx, dw, da, db = map(_keep, grads, (need_x, need_router, need_a, need_b))
    zero_frozen_rows(da, db, frozen, offsets, shared_a)
    return dx, dw, da, db


def _grouped_lora_backward(
    dy, x, a, b, s, indices, weights, scaling, offsets, shared_a, slots, *needs
):
    *needs, plan = needs
    routing, experts = (indices, weights), (scaling, offsets, shared_a)
    if slots != "none":
        grads = reference.slot_lora_backward(dy, x, a, b, s, *routing, *experts, slots)
    else:
        s = _rows(s, indices, offsets, shared_a, plan)
        grads = reference.grouped_lora_backward(dy, x, a, b, s, *routing, *experts)
    dx, dweights, da, db = grads
    return _backward((dx, dweights, da.to(a.dtype), db.to(b.dtype)), offsets, shared_a, *needs)


def _routed_lora_backward(
    dy, dweights, dlogits, dmean_prob, dlse, x, w, a, b, s, indices, weights, logits, scaling, offsets,
    shared_a, gate, renormalize, *needs,
):  # fmt: skip
    *needs, need_router_bias, plan = needs
    dx, dw, da, db, drouter_bias = reference.routed_lora_backward(
        dy, dweights, dlogits, dmean_prob, dlse, x, w, a, b, _rows(s, indices, offsets, shared_a, plan),
        indices, weights, logits, scaling, offsets, shared_a, gate, renormalize,
    )  # fmt: skip
    grads = dx, dw.to(w.dtype), da.to(a.dtype), db.to(b.dtype)
    grads = _backward(grads, offsets, shared_a, *needs)
    return *grads, _keep(drouter_bias, need_router_bias)


def reference_operator(name):
    """The operator in plain PyTorch, on any device and for every plan: here, else as in reference.py."""
    return globals().get(f"_{name}") or getattr(reference, name)


def _without_autocast(function):
    """Autocast decided x's dtype before the call; inside, it would round the products themselves."""

    def run(*args):
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


for _name, _schema in SCHEMAS.items():
    _operator, _plain = f"lora_moe::{_name}", _without_autocast(reference_operator(_name))
    torch.library.define(_operator, _schema)
    torch.library.impl(_operator, "CompositeExplicitAutograd", _plain)
    for _key in tracing.REFUSED_KEYS:
        torch.library.impl(_operator, _key, tracing.refusing(_name))
    torch.library.register_fake(_operator, tracing.on_one_device(_name, getattr(tracing, _name)))
