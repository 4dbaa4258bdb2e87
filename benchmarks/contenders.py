"""Ours and the peers on one shape, as calls without arguments; each is verified before it is timed."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import peers
from benchmarks.shapes import DECODE, Inputs
from lora_moe import backend, functional, plan

GATHER_BYTES = 2 << 30  # a peer that would copy more weights than this is left out
UNROLLED = 16  # experts; torch.compile unrolls a loop over them, which takes minutes for many

# Errors ||out - truth|| / ||truth|| in units in the last place.  Correct ones stay below 7 in 16 bits (gather
# sums its gradients in 16 bits) and below 30 in fp32; a wrong expert's error is hundreds.
LIMITS = {torch.float32: 64.0, torch.bfloat16: 10.0, torch.float16: 10.0}
WIDE = "ours, fp32 adapters"  # as in LoraMoeLinear with a 16-bit x


class LeftOut(Exception):
    """Why a contender is not timed on a shape."""


@dataclass(frozen=True)
class Contender:
    name: str
    forward: Callable  # (x, router, a, b, top_k) -> y
    layout: Callable = peers.rows
    same: bool = True
    adapters: torch.dtype | None = None  # of A, B and router; x's by default

    def differs(self, dtype):
        """Whether it differs from the contender with x's dtype."""
        return self.adapters != dtype


def ours(x, router, a, b, top_k):
    return functional.routed_lora(
        x, router, a, b, top_k, rank_offsets=len(a) // len(router), renormalize=top_k > 1
    )[0]


def planned(name, *args):
    with plan.override(name):
        return ours(*args)


def contenders(device="cpu", compiled=True):
    """Ours; each of our plans if there are several; each peer, eager and compiled."""
    yield Contender("ours", ours)
    yield Contender(WIDE, ours, adapters=torch.float32)
    plans = plan.BACKENDS[backend.serving(device)]
    if len(plans) > 1:
        yield from (Contender(f"ours, {name}", partial(planned, name)) for name in plans)
    for peer in peers.PEERS:
        yield Contender(peer.name, peer.forward, peer.layout, peer.same)
        if compiled:
            function = torch.compile(peer.forward, dynamic=False)
            yield Contender(f"{peer.name}, compiled", function, peer.layout, peer.same)


def refuse_hopeless(name, shape, itemsize):
    """Raises LeftOut if a contender would take gigabytes or minutes."""
    needed = itemsize * shape.T * shape.K * shape.r * (shape.D_in + shape.D_out)
    if name.startswith("gather") and needed > GATHER_BYTES:
        raise LeftOut(f"would copy more than {GATHER_BYTES >> 30} GiB of weights")
    if name == "every expert, compiled" and shape.E > UNROLLED:
        raise LeftOut(f"compiling takes minutes with more than {UNROLLED} experts")
    if name == f"ours, {plan.DECODE}" and shape.T > plan.DECODE_T:
        raise LeftOut(f"the plan is for up to {plan.DECODE_T} tokens")


def states(layout, shape, inputs, backward, copies, adapters=None):
    """`copies` of (x, router, a, b), with rows stored as `layout` says; they require grad if asked."""

    def own(t, dtype=None):
        copy = torch.empty(t.shape, dtype=dtype or t.dtype, device=t.device).copy_(t)
        return copy.requires_grad_(backward)

    def one():
        a, b = ([own(t, adapters) for t in tensors] for tensors in layout(inputs, shape.K))
        if layout is not peers.separate:
            (a,), (b,) = a, b
        return own(inputs.x), own(inputs.router, adapters), a, b

    return [one() for _ in range(copies)]


def prepare(forward, states, top_k, dy):
    """call() -> [y], or with dy [y, dx, drouter, da..., db...]; the copies of the weights take turns."""
    turns = itertools.cycle(states)

    def call():
        state = next(turns)
        if dy is None:
            with torch.no_grad():
                return [forward(*state, top_k)]
        y = forward(*state, top_k)
        return [y, *torch.autograd.grad(y, leaves(state), dy, allow_unused=True)]

    return call


def leaves(state):
    return [t for part in state for t in (part if isinstance(part, list) else [part])]


def copies_for(shape, inputs, cache):
    """Decode must read its weights from memory: enough copies to exceed four times the cache."""
    if shape.T > DECODE:
        return 1
    touched = inputs.x.element_size() * inputs.touched * shape.r * (shape.D_in + shape.D_out)
    return -(-4 * cache // touched)


def truth(contender, shape, inputs, backward):
    """The fp64 outputs of the loop for the same rounded inputs; tests check the loop token by token."""
    tensors = [t.double() for t in vars(inputs).values() if t.is_floating_point()]
    double = Inputs(*tensors, inputs.ids)
    judge = peers.PEERS[0] if contender.same else contender
    state = states(judge.layout, shape, double, backward, 1)
    call = prepare(judge.forward, state, shape.K, double.dy if backward else None)
    return joined(call(), judge.layout, shape)


def joined(outputs, layout, shape):
    """y and, after a backward, dx, drouter, da, db; per-expert parts are concatenated, missing ones are 0."""
    if len(outputs) == 1 or layout is not peers.separate:
        return outputs
    y, dx, drouter, *parts = outputs
    halves = parts[: shape.E], parts[shape.E :]
    return [y, dx, drouter, *(torch.cat(_filled(half, shape.r)) for half in halves)]


def _filled(parts, r):
    like = next(p for p in parts if p is not None)
    return [like.new_zeros(r, like.shape[1]) if p is None else p for p in parts]


def units(outputs, right, dtype):
    """Largest relative error of an output in units in the last place, infinite for a NaN.

    If neither side has a gradient, they agree.
    """
    errors = [0.0]
    for out, expected in zip(outputs, right, strict=True):
        if out is None and expected is None:
            continue
        error = ((out.double() - expected).norm() / expected.norm()).item()
        errors.append(error if error == error else float("inf"))
    return max(errors) / (torch.finfo(dtype).eps / 2)
