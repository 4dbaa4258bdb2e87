"""Router top-k, in one pass over x:

    logits = x W^T + router_bias      p = gate(logits)
    ids = top-k of p + bias      weights = p[ids] (/ their sum)

The decision is made in registers, on the tile of logits that one pass over x left there.  The statistics
for the auxiliary losses are written as one row per tile and added in order.  If there are more experts than a
tile holds, `shrink` computes the logits and the same kernel decides on them.
Reads T*D_in + E*D_in, writes 4*T*(E + 2K + 1).

Letters: T tokens, E experts, K picked experts per token.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .add_splits import add_splits
from .gating import route
from .launching import launch
from .numerics import project, rows_of
from .operands import require_supported, rows_contiguous
from .shrink import shrink
from .tiles import choose

MAX_EXPERTS = 256  # the most whose logits fit into a tile that is also a dot's accumulator


class RoutingBuffers(NamedTuple):
    """Where the kernels write a decision; the statistics have one row per tile of tokens."""

    indices: torch.Tensor  # (T, K) int32
    weights: torch.Tensor  # (T, K)
    logits: torch.Tensor | None = None  # (T, E)
    lse: torch.Tensor | None = None  # (T,)
    mean_prob: torch.Tensor | None = None  # (tiles, E)
    counts: torch.Tensor | None = None  # (tiles, E) int32; int64 if there is only one tile

    def results(self):
        """indices, weights, logits, mean_prob (E,), lse, counts (E,) int64"""
        if len(self.counts) == 1:
            mean_prob, counts = self.mean_prob[0], self.counts[0]
        else:
            E = self.mean_prob.shape[1]
            mean_prob, counts = self.lse.new_empty(E), self.indices.new_empty(E, dtype=torch.int64)
            add_splits((self.mean_prob, mean_prob), (self.counts, counts))
        return self.indices, self.weights, self.logits, mean_prob, self.lse, counts


class Biases(NamedTuple):
    """Biases of the router; fp32, contiguous, each optional."""

    selection: torch.Tensor | None  # (E,), added to the gates for top-k only
    router: torch.Tensor | None  # (E,), added to the logits


NO_BIASES = Biases(None, None)


def biases_of(bias, router_bias):
    return Biases(*(None if b is None else b.float().contiguous() for b in (bias, router_bias)))


def new_routing(x, E, K, block_t, keep_logits=True):
    T, tiles = len(x), triton.cdiv(len(x), block_t)
    return RoutingBuffers(
        x.new_empty(T, K, dtype=torch.int32),
        x.new_empty(T, K, dtype=torch.float32),
        x.new_empty(T, E, dtype=torch.float32) if keep_logits else None,
        x.new_empty(T, dtype=torch.float32),
        x.new_empty(tiles, E, dtype=torch.float32),
        x.new_empty(tiles, E, dtype=torch.int64 if tiles == 1 else torch.int32),
    )


def gate_options(K, gate="softmax", renormalize=False, top_p=math.inf, threshold=0.0):
    """Without a router, only K matters."""
    return {
        "top_p": top_p,
        "threshold": threshold,
        "K": K,
        "GATE": gate,
        "RENORMALIZE": renormalize,
    }


@triton.jit(do_not_specialize=["T"])
def _router_topk_kernel(
    x_ptr,  # (T, D_in), or None: the logits are given
    stride_xt,
    w_ptr,  # (E, D_in)
    stride_we,
    logits_ptr,  # (T, E)
    biases,
    routing,
    T,
    E,
    D_in,
    top_p,
    threshold,
    K: tl.constexpr,
    GATE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t0 = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    t_ok, e_ok = t < T, e < E

    if x_ptr is None:
        inside = t_ok[:, None] & e_ok[None, :]
        logits = tl.load(rows_of(logits_ptr, t0, E, e, BLOCK_T), mask=inside, other=0.0)
    else:
        _, logits = project(
            x_ptr, stride_xt, t, t_ok, None, 0, e, e_ok, w_ptr, stride_we, e, e_ok, 0, D_in, BLOCK_D, "ieee"
        )  # fmt: skip
    route(
        logits,
        biases,
        top_p,
        threshold,
        routing,
        tl.program_id(1),
        t0,
        t,
        t_ok,
        e,
        e_ok,
        T,
        E,
        0,
        K,
        GATE,
        RENORMALIZE,
    )


def router_topk(x, w, bias, router_bias, top_k, gate, renormalize, top_p, threshold):
    """indices, weights (T, K), logits (T, E), mean_prob (E,), lse (T,), counts (E,)."""
    require_supported(x, w)
    options = gate_options(top_k, gate, renormalize, top_p, threshold)
    biases = biases_of(bias, router_bias)
    if len(w) > MAX_EXPERTS:
        _, logits = shrink(x, None, w)
        return decide(logits, biases, options)
    x, w = rows_contiguous(x), rows_contiguous(w)
    source = x, x.stride(0), w, w.stride(0), None
    return _launch(x, source, biases, len(w), "router_topk", options)


def route_logits(logits, bias, top_k, gate, renormalize, top_p, threshold):
    """indices, weights (T, K), mean_prob (E,), lse (T,), counts (E,), from logits (T, E)."""
    require_supported(logits)
    options = gate_options(top_k, gate, renormalize, top_p, threshold)
    logits = logits.float().contiguous()
    indices, weights, _, *rest = decide(logits, biases_of(bias, None), options, keep_logits=False)
    return indices, weights, *rest


def decide(logits, biases, options, keep_logits=True):
    """Like router_topk, but from logits in memory; `options` come from gate_options."""
    source = None, 0, None, 0, logits
    return _launch(logits, source, biases, logits.shape[1], "route_logits", options, keep_logits)


def _launch(x, source, biases, E, kind, options, keep_logits=True):
    block_e = max(16, triton.next_power_of_2(E))
    tile = choose(kind, x, block_e)
    routing = new_routing(x, E, options["K"], tile["BLOCK_T"], keep_logits)
    if len(x):
        launch(
            x,
            _router_topk_kernel,
            (triton.cdiv(len(x), tile["BLOCK_T"]),),
            *source,
            *(biases, routing, len(x), E, x.shape[1]),
            BLOCK_E=block_e,
            **options,
            **tile,
        )
    return routing.results()
