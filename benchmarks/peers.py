"""What a skilled user writes in plain PyTorch, as functions; examples/common/peers.py wraps them in modules.

    y_t = sum over e in topk(softmax(W x_t)) of  g_te scaling B_e A_e x_t

Letters: T tokens, E experts, K picked per token, r one expert's rank, R = E r rank rows, D_in and D_out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def route(x, router, top_k, scaling=1.0, ids=None):
    """ids (T, K), weights (T, K), gate (T, E): softmax, top-k unless ids are given, renormalized, scaled."""
    gate = F.linear(x, router).softmax(dim=-1)  # (T, E)
    ids = gate.topk(top_k, dim=-1).indices if ids is None else ids
    return ids, rescale(gate.gather(1, ids), scaling), gate


def rescale(weights, scaling=1.0):
    """A single weight is unchanged (Switch): renormalized, it would be 1 and teach the router nothing."""
    if weights.shape[1] > 1:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scaling


def spread(ids, weights, num_experts):
    """(T, E): the weights where picked, zero elsewhere."""
    return weights.new_zeros(len(ids), num_experts).scatter(1, ids, weights)


def loop_into(y, x, a, b, ids, weights, experts):
    """One expert at a time, in place into y, as in HF Mixtral.

    a: E of (r, D_in), b: E of (r, D_out), separate parameters: each slice of a single parameter would cost
    a full-size gradient.
    """
    for e in experts:
        rows, slot = torch.where(ids == e)
        out = F.linear(x[rows], a[e]) @ b[e]
        y.index_add_(0, rows, out * weights[rows, slot, None])
    return y


def hidden(x, a, gates):
    """H (T, R) over the rows of all experts at once; with top-k gates, most of it is zero."""
    return F.linear(x, a) * gates.repeat_interleave(len(a) // gates.shape[1], dim=1)


def by_expert(ids, num_experts):
    """Slots sorted by expert (T K,), and where each expert ends (E,); without host synchronization."""
    experts, order = ids.flatten().sort(stable=True)
    every = torch.arange(num_experts, device=ids.device)
    return order, torch.searchsorted(experts, every, right=True, out_int32=True)


# --- whole peers: (x, router, a, b, top_k) -> y; rank rows as (R, D) unless `layout` says otherwise


def loop_over_experts(x, router, a, b, top_k):
    ids, weights, _ = route(x, router, top_k)
    y = x.new_zeros(len(x), b[0].shape[1])
    return loop_into(y, x, a, b, ids, weights, ids.unique().tolist())  # experts with tokens


def stacked(x, router, a, b, top_k):
    """The strong baseline: two dense products with a mask between them."""
    ids, weights, gate = route(x, router, top_k)
    dense = top_k == len(router)
    return hidden(x, a, gate if dense else spread(ids, weights, len(router))) @ b


def grouped_mm(x, router, a, b, top_k):
    """Tokens sorted by expert, two grouped products, ordered sums over a token's slots."""
    ids, weights, _ = route(x, router, top_k)
    order, ends = by_expert(ids, len(router))
    a, b = a.unflatten(0, (len(router), -1)), b.unflatten(0, (len(router), -1))
    h = torch._grouped_mm(x[order // top_k], a.transpose(1, 2), offs=ends)  # (T K, r)
    out = torch._grouped_mm(h * weights.flatten()[order, None], b, offs=ends)  # (T K, D_out)
    return out[order.argsort()].view(*ids.shape, -1).sum(1)


def gather(x, router, a, b, top_k):
    """Copies the experts' weights for each token and uses batched products (BMM)."""
    ids, weights, _ = route(x, router, top_k)
    a, b = (t.unflatten(0, (len(router), -1))[ids].flatten(1, 2) for t in (a, b))  # (T, K r, D)
    h = torch.bmm(a, x[:, :, None]).squeeze(2)  # (T, K r)
    h = h * weights.repeat_interleave(h.shape[1] // top_k, dim=1)
    return torch.bmm(h[:, None], b).squeeze(1)


def every_expert(x, router, a, b, top_k):
    """All experts on all tokens, one after another, each output times its gate, as in X-LoRA."""
    ids, weights, _ = route(x, router, top_k)
    gates = spread(ids, weights, len(router))  # (T, E)
    return sum(F.linear(x, a[e]) @ b[e] * gates[:, e, None] for e in range(len(router)))


def plain_lora(x, router, a, b, top_k):
    """One LoRA of rank K r without a router, as PEFT computes it: less work, a different function."""
    return F.linear(F.linear(x, a), b) * 1.0


def rows(inputs, top_k):
    return [inputs.a], [inputs.b]


def separate(inputs, top_k):
    experts = len(inputs.router)
    return inputs.a.chunk(experts), inputs.b.chunk(experts)


def active(inputs, top_k):
    rank = top_k * len(inputs.a) // len(inputs.router)
    return [inputs.a[:rank]], [inputs.b[:rank].T]


@dataclass(frozen=True)
class Peer:
    name: str
    forward: Callable
    layout: Callable = rows  # how it stores the experts' rows
    same: bool = True  # computes the same function, so it may be the best peer


PEERS = [
    Peer("loop", loop_over_experts, separate),
    Peer("stacked", stacked),
    Peer("grouped_mm", grouped_mm),
    Peer("gather", gather),
    Peer("every expert", every_expert, separate),
    Peer("plain LoRA", plain_lora, active, same=False),
]
