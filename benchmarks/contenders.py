"""Ours and the peers on one shape, as calls without arguments; each is checked before it is timed."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import peers
from benchmarks.shapes import DECODE, Inputs
from lora_moe import functional, plan

GATHER_BYTES = 2 << 30  # a peer that would copy more weights than this is left out
# Errors ||out - truth|| / ||truth|| in units in the last place.  Right ones stay below 7 in 16 bit (gather:
# its gradients are summed in 16 bit) and below 30 in fp32; a wrong expert errs by hundreds.
LIMITS = {torch.float32: 64.0, torch.bfloat16: 10.0, torch.float16: 10.0}
PLANS = ("rank_dense", "segmented", "decode")


@dataclass(frozen=True)
class Contender:
    name: str
    forward: Callable  # (x, router, a, b, top_k) -> y
    layout: Callable = peers.rows
    same: bool = True
    compiled: bool = False


def ours(x, router, a, b, top_k):
    r = len(a) // len(router)
    return functional.routed_lora(x, router, a, b, top_k, rank_offsets=r, renormalize=top_k > 1)[0]


def under(name, x, router, a, b, top_k):
    with plan.override(name):
        return ours(x, router, a, b, top_k)


def contenders(device="cpu", compiled=True):
    """Ours; on a GPU every plan of ours; each peer, eager and compiled."""
    yield Contender("ours", ours)
    if device != "cpu" and hasattr(plan, "override"):
        for name in PLANS:
            yield Contender(f"ours, {name}", partial(under, name))
    for peer in peers.PEERS:
        yield Contender(peer.name, peer.forward, peer.layout, peer.same)
        if compiled:
            function = torch.compile(peer.forward, dynamic=False)
            yield Contender(f"{peer.name}, compiled", function, peer.layout, peer.same, True)


class LeftOut(Exception):
    """Why a contender is not timed on a shape."""


def prepare(contender, shape, inputs, backward, copies):
    """call() -> outputs, the copies of the weights taking turns; raises LeftOut."""
    size = inputs.x.element_size()
    if contender.name.startswith("gather"):
        needed = size * shape.T * shape.K * shape.r * (shape.D_in + shape.D_out)
        if needed > GATHER_BYTES:
            raise LeftOut(f"would copy {needed / 2**30:.0f} GiB of weights")
    states = itertools.cycle([state_of(contender, shape, inputs, backward) for _ in range(copies)])

    def forward(state):
        x, router, a, b = state
        return contender.forward(x, router, a, b, shape.K)

    def call():
        if not backward:
            with torch.no_grad():
                return [forward(next(states))]
        state = next(states)
        y = forward(state)
        return [y, *torch.autograd.grad(y, leaves(state), inputs.dy, allow_unused=True)]

    return call


def state_of(contender, shape, inputs, backward):
    """x, router, and the rows as the contender keeps them, all its own, requiring grad if asked."""
    a, b = contender.layout(inputs, shape.K)

    def own(t):
        return t.detach().clone(memory_format=torch.contiguous_format).requires_grad_(backward)

    a, b = ([own(t) for t in tensors] for tensors in (a, b))
    whole = contender.layout is not peers.separate
    return own(inputs.x), own(inputs.router), *((a[0], b[0]) if whole else (a, b))


def leaves(state):
    return [t for part in state for t in (part if isinstance(part, list) else [part])]


def copies_for(shape, inputs, cache):
    """Decode must read its weights from memory: so many copies that four caches would not hold them."""
    if shape.T > DECODE:
        return 1
    touched = inputs.x.element_size() * inputs.touched * shape.r * (shape.D_in + shape.D_out)
    return -(-4 * cache // touched)


def truth(contender, shape, inputs, backward):
    """The same in fp64 on the same rounded inputs: by the loop, which the tests hold to single tokens."""
    tensors = [t.double() for t in vars(inputs).values() if t.is_floating_point()]
    judge = peers.PEERS[0] if contender.same else contender
    twin = Contender(judge.name, judge.forward, judge.layout)
    outputs = prepare(twin, shape, Inputs(*tensors, inputs.ids), backward, copies=1)()
    return flat(twin, outputs, shape)


def flat(contender, outputs, shape):
    """y and, after a backward, dx, drouter, da, db: the parts of a and b together, None as zeros."""
    if len(outputs) == 1 or contender.layout is not peers.separate:
        return outputs
    y, dx, drouter, *parts = outputs
    a, b = parts[: shape.E], parts[shape.E :]
    return [y, dx, drouter, *(torch.cat(filled(p, shape.r)) for p in (a, b))]


def filled(parts, r):
    like = next(p for p in parts if p is not None)
    return [like.new_zeros(r, like.shape[1]) if p is None else p for p in parts]


def worst_error(outputs, expected):
    """Largest relative error of an output, infinite for a NaN; both None (no gradient) is right."""
    errors = [0.0]
    for out, right in zip(outputs, expected, strict=True):
        if right is None and out is None:
            continue
        error = ((out.double() - right).norm() / right.norm()).item()
        errors.append(error if error == error else float("inf"))
    return max(errors)
