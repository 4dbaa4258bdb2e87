"""Operator schemas, and the reference implementation for every device.

Eleven operators in the namespace `lora_moe`.  backend.py registers one backend's kernels per device;
operators without a kernel run reference.py.  Gradients are in autograd.py, outside the operators.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts.
Contract: x (T, D_in), base and dy (T, D_out) and the parameters have unit stride along columns; y and dy
are (T K, D_out) with slots "apart", base either, x (T K, D_in) with slots "sum", one row per slot;
w (E, D_in) has x's dtype or fp32; bias, router_bias and scaling (E,), weights (T, K), logits and every h
and S are fp32 (all fp64 for an fp64 x); indices (T, K) are int32, -1 in empty slots.  The operators with
experts take the parameters a (R or r, D_in) and b (R, D_out) in any dtype, round them to x's dtype for the
products, and return gradients in each parameter's dtype, rounded once; `shrink` and `expand` take them in
x's dtype, and `wgrad` returns fp32.  Gradients that are not needed are returned empty, with shape (0,).
"""

from __future__ import annotations

import torch

from . import reference, tracing
from .checks import wrong_id
from .plan import SEGMENTED
from .tracing import argument_names, by_name, call, keep

_ROUTER = "int top_k, str gate, bool renormalize, float top_p, float threshold"
_EXPERTS = "Tensor scaling, int[] offsets, bool shared_a"
_ROUTING = "Tensor indices, Tensor weights"
_SAVED = "Tensor x, {w}Tensor a, Tensor b, Tensor s"
_NEEDS = "int[] frozen, bool need_x, bool need_router, bool need_a, bool need_b"
_AUX = "Tensor? dweights, Tensor? dlogits, Tensor? dmean_prob, Tensor? dlse"

VERSION = 5  # of the schemas; must match the extensions' (csrc/tensors.h)

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
    # y of several layers with adjacent outputs; for inference
    "routed_lora_banks": "(Tensor x, Tensor[] w, Tensor[] a, Tensor[] b, Tensor base, Tensor?[] bias,"
    " Tensor?[] router_bias, Tensor[] scaling, int[] offsets, bool shared_a, int[] starts,"
    f" {_ROUTER}, str plan) -> Tensor",
    # dx, dw, da, db, drouter_bias
    "routed_lora_backward": f"(Tensor dy, {_AUX}, {_SAVED.format(w='Tensor w, ')}, {_ROUTING},"
    f" Tensor logits, {_EXPERTS}, str gate, bool renormalize, {_NEEDS}, bool need_router_bias, str plan)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}


# --- the reference implementation of every operator ---------------------------------------------


def check_ids(indices: torch.Tensor, num_experts: int) -> None:
    """Raise for invalid ids on a CPU, where reading them is free; a GPU masks them."""
    wrong = wrong_id(indices, num_experts) if indices.device.type == "cpu" else None
    if wrong is not None:
        raise ValueError(f"indices: expected expert ids in [-1, {num_experts}), got {wrong}")


# Where reference.py differs from an operator, a function named _<operator> adapts it; v are the operator's
# arguments by their names in the schema.


def _grouped_lora(v):
    check_ids(v["indices"], len(v["scaling"]))
    if v["slots"] != "none":
        return call(reference.slot_lora, v)
    y, s = call(reference.grouped_lora, v)
    return y, _saved(s, v["indices"], v)


def _routed_lora(v):
    *out, s = call(reference.routed_lora, v)
    return *out, _saved(s, out[1], v)


def _routed_lora_banks(v):
    y = v["base"].clone(memory_format=torch.contiguous_format)
    of_a_bank = "w", "a", "b", "bias", "router_bias", "scaling"
    for start, *own in zip(v["starts"], *(v[name] for name in of_a_bank)):
        bank = dict(zip(of_a_bank, own))
        columns = slice(start, start + bank["b"].shape[1])
        y[:, columns] = _routed_lora({**v, **bank, "base": v["base"][:, columns]})[0]
    return y


def _grouped_lora_backward(v):
    if v["slots"] != "none":
        return _needed(v, *call(reference.slot_lora_backward, v))
    return _needed(v, *call(reference.grouped_lora_backward, {**v, "s": _rows(v)}))


def _routed_lora_backward(v):
    dx, dw, *grads, drouter_bias = call(reference.routed_lora_backward, {**v, "s": _rows(v)})
    needed = _needed(v, dx, dw.to(v["w"].dtype), *grads)
    return *needed, keep(drouter_bias, v["need_router_bias"])


def _saved(s, indices, v):
    """S in the plan's layout."""
    by_slot = v["plan"] == SEGMENTED and not v["shared_a"]
    return reference.slots_of_rows(s, indices, v["offsets"]) if by_slot else s


def _rows(v):
    """The inverse of _saved."""
    by_slot = v["plan"] == SEGMENTED and not v["shared_a"]
    return reference.rows_of_slots(v["s"], v["indices"], v["offsets"]) if by_slot else v["s"]


def _needed(v, dx, dw, da, db):
    """The needed gradients in the parameters' dtypes, with zero rows for frozen experts."""
    da, db = da.to(v["a"].dtype), db.to(v["b"].dtype)
    for expert in v["frozen"]:
        rows = slice(*v["offsets"][expert : expert + 2])
        db[rows] = 0
        if not v["shared_a"]:
            da[rows] = 0
    needs = (v[f"need_{name}"] for name in ("x", "router", "a", "b"))
    return tuple(map(keep, (dx, dw, da, db), needs))


def reference_operator(name):
    """The operator in plain PyTorch, on any device and for every plan."""
    between, names = globals().get(f"_{name}"), argument_names(name)
    if between is not None:
        return lambda *args: between(dict(zip(names, args)))
    return by_name(name, getattr(reference, name))


def _without_autocast(function):
    """Disable autocast: it has already been applied to x, and would round the products."""

    def run(*args):
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


for _name, _schema in SCHEMAS.items():
    _operator = f"lora_moe::{_name}"
    torch.library.define(_operator, _schema)
    _plain = _without_autocast(reference_operator(_name))
    torch.library.impl(_operator, "CompositeExplicitAutograd", _plain)
    for _key in tracing.REFUSED_KEYS:
        torch.library.impl(_operator, _key, tracing.refusing(_name))
    _fake = by_name(_name, getattr(tracing, _name))
    torch.library.register_fake(_operator, tracing.on_one_device(_name, _fake))
