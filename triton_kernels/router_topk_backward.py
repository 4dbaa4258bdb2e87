"""Gradient of the router's logits from those of weights, logits, mean_prob and lse, each optional.

With w = p / z, z the sum over the picked:
    dp = (dw - sum of dw w) / z + dmean_prob / T
    dlogits = p (dp - sum of p dp) for a softmax, p (1 - p) dp for sigmoids; + softmax(logits) dlse + dlogits

A token's row of experts fits into a tile of registers.  Reads and writes about 4*T*(2E + 3K) bytes.

Letters: T tokens, E experts, K picked experts per token.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .gating import router_gradient, scatter_slots, share_of_slots
from .launching import launch
from .numerics import rows_of
from .operands import require_supported
from .tiles import choose


class AuxGradients(NamedTuple):
    """Gradients that reach the routing from outside the experts; fp32, contiguous, each optional."""

    dweights: torch.Tensor | None  # (T, K)
    dlogits: torch.Tensor | None  # (T, E)
    dmean_prob: torch.Tensor | None  # (E,)
    dlse: torch.Tensor | None  # (T,)


def aux_gradients(dweights=None, dlogits=None, dmean_prob=None, dlse=None):
    grads = dweights, dlogits, dmean_prob, dlse
    return AuxGradients(*(None if g is None else g.float().contiguous() for g in grads))


@triton.jit(do_not_specialize=["T"])
def _router_topk_backward_kernel(
    logits_ptr,  # (T, E)
    indices_ptr,  # (T, K)
    weights_ptr,  # (T, K)
    aux,
    out_ptr,  # (T, E)
    T,
    E,
    K: tl.constexpr,
    GATE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t0 = tl.program_id(0).to(tl.int64) * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    t_ok, e_ok = t < T, e < E
    inside = t_ok[:, None] & e_ok[None, :]

    logits = tl.load(rows_of(logits_ptr, t0, E, e, BLOCK_T), mask=inside, other=0.0)
    picked = scatter_slots(indices_ptr, None, t, t_ok, e, e_ok, K)
    dgate = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    share = tl.zeros((BLOCK_T,), tl.float32)
    if aux.dweights is not None:
        dgate = scatter_slots(indices_ptr, aux.dweights, t, t_ok, e, e_ok, K)
        share = share_of_slots(weights_ptr, aux.dweights, t, t_ok, K)
    out = router_gradient(
        logits, dgate, picked, share, aux, t0, t, t_ok, e, e_ok, T, E, GATE, RENORMALIZE
    )
    tl.store(rows_of(out_ptr, t0, E, e, BLOCK_T), out, mask=inside)


def router_topk_backward(
    dweights, dlogits, dmean_prob, dlse, indices, weights, logits, gate, renormalize
):
    """The total gradient of the logits (T, E)."""
    require_supported(logits)
    T, E = logits.shape
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if T == 0:
        return out
    block_e = triton.next_power_of_2(E)
    tile = choose("router_topk_backward", logits, block_e)
    launch(
        logits,
        _router_topk_backward_kernel,
        (triton.cdiv(T, tile["BLOCK_T"]),),
        *(logits.contiguous(), indices.contiguous(), weights.contiguous()),
        *(aux_gradients(dweights, dlogits, dmean_prob, dlse), out, T, E),
        K=indices.shape[1],
        GATE=gate,
        RENORMALIZE=renormalize,
        BLOCK_E=block_e,
        **tile,
    )
    return out


def logits_gradient(dweights, routing, router):
    """The same from the experts' part of dweights and a `router` as in rank_gradient."""
    gate, renormalize, aux = router
    if aux.dweights is not None:
        dweights = dweights + aux.dweights
    return router_topk_backward(dweights, *aux[1:], *routing[:3], gate, renormalize)
