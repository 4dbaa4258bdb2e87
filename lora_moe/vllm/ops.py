"""Three serving operators that are opaque to the compiler.

vLLM compiles a model once for any number of tokens; these operators choose kernels and run checks at run
time.

    add_experts   y + the experts of every bank of a layer, from x
    shrink        S = x A^T and the logits, from this rank's part of x
    add_gated     y + gate(S, logits) B, with the logits of all ranks

Letters: T tokens, E experts, R rank rows of all experts together.
"""

from __future__ import annotations

import torch

from .. import functional as F
from ..rows import dense_gates
from .rules import Rule, alike, from_text

NAMESPACE = "lora_moe_serving"
_BANK = "Tensor{n} b, Tensor{n} scaling, Tensor{n} experts, Tensor?{n} bias, Tensor?{n} router_bias"
_SCHEMAS = {
    "add_experts": f"(Tensor x, Tensor y, Tensor[] w, Tensor[] a, {_BANK.format(n='[]')}, str rules)"
    " -> Tensor",
    "shrink": "(Tensor x, Tensor w, Tensor a) -> (Tensor, Tensor)",
    "add_gated": f"(Tensor s, Tensor logits, Tensor y, {_BANK.format(n='')}, str rules) -> Tensor",
}


def add_experts(x, y, w, a, b, scaling, experts, bias, router_bias, rules):
    """y with every bank's experts added to its columns.  x (T, D_in), y (T, widths of this rank)

    Banks with the same rule run in one call; others run one after another, out of place.
    """
    rules = from_text(rules)
    if alike(rules) and (len(rules) > 1 or x.is_cpu):
        rule = rules[0]
        return F.routed_lora_banks(
            x, w, a, b, rule.top_k, y, starts=[r.start for r in rules], rank_offsets=rule.offsets,
            scaling=scaling, shared_a=rule.shared_a, gate=rule.gate, renormalize=rule.renormalize,
            biases=bias, top_p=rule.top_p, threshold=rule.threshold, router_biases=router_bias,
        )  # fmt: skip
    banks = list(zip(w, a, b, scaling, experts, bias, router_bias))
    if len(banks) == 1 and rules[0].stop - rules[0].start == y.shape[1]:
        return _bank(x, y, *banks[0], rules[0])
    out = y.clone()
    for bank, rule in zip(banks, rules, strict=True):
        columns = slice(rule.start, rule.stop)
        out[:, columns] = _bank(x, y[:, columns].contiguous(), *bank, rule)
    return out


def _bank(x, y, w, a, b, scaling, experts, bias, router_bias, rule: Rule):
    if rule.max_threshold is not None:
        return _gated(*F.shrink(x, a, w), y, b, scaling, experts, bias, router_bias, rule)
    return F.routed_lora(
        x, w, a, b, rule.top_k, rank_offsets=rule.offsets, scaling=scaling, shared_a=rule.shared_a,
        base=y, gate=rule.gate, renormalize=rule.renormalize, bias=bias, top_p=rule.top_p,
        threshold=rule.threshold, router_bias=router_bias,
    )[0]  # fmt: skip


def shrink(x, w, a):
    return F.shrink(x, a, w)


def add_gated(s, logits, y, b, scaling, experts, bias, router_bias, rules):
    return _gated(s, logits, y, b, scaling, experts, bias, router_bias, *from_text(rules))


def _gated(s, logits, y, b, scaling, experts, bias, router_bias, rule: Rule):
    """Linear in S for a given gate, so results of ranks with parts of x add up."""
    if router_bias is not None:
        logits = logits + router_bias
    gates = dense_gates(rule.decide(logits, bias), rule.experts) * scaling  # (T, E)
    s = s.repeat(1, rule.experts) if rule.shared_a else s  # (T, R)
    return F.expand(s * gates[:, experts], b, y)


def _like_y(x, y, *_):
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _gated_like_y(s, logits, y, *_):
    return _like_y(s, y)


def _shrunk(x, w, a):
    empty = x.new_empty
    return tuple(empty((x.shape[0], rows.shape[0]), dtype=torch.float32) for rows in (a, w))


for _name, _run, _fake in (
    ("add_experts", add_experts, _like_y),
    ("shrink", shrink, _shrunk),
    ("add_gated", add_gated, _gated_like_y),
):
    torch.library.define(f"{NAMESPACE}::{_name}", _SCHEMAS[_name])
    torch.library.impl(f"{NAMESPACE}::{_name}", "CompositeExplicitAutograd", _run)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake)
