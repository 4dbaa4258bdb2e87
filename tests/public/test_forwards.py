"""Analysis of a forward's source: which weights it reads, which children it calls, what it returns."""

from __future__ import annotations

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_moe.forwards import Forward


class Block(nn.Module):
    """A parent of two linears; subclasses differ only in their forward."""

    fused = False

    def __init__(self):
        super().__init__()
        self.proj, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4)])
        self.scale = 2

    def product(self, x):
        return x @ self.proj.weight.T


class Calls(Block):
    def forward(self, x):
        x = x.to(self.proj.weight.dtype).to(self.proj.weight)
        if isinstance(self.proj.weight, torch.Tensor) and self.proj.weight is not None:
            x = x.view(-1, self.proj.weight.shape[1]) + self.proj.weight.new_zeros(4)
        if getattr(self.proj.weight, "_is_hf_initialized", False) or hasattr(self, "other"):
            x = x.clone()
        return self.proj(x)


class Reads(Block):
    def forward(self, x):
        return self.out(F.linear(x, self.proj.weight, self.proj.bias))


class ReadsInAMethod(Block):
    def forward(self, x):
        return self.product(x)


class ReadsThroughNames(Block):
    def forward(self, x):
        layer = self.proj
        weight = layer.weight
        return x @ weight.T


class ReadsByGetattr(Block):
    def forward(self, x):
        return F.linear(x, getattr(getattr(self, "proj"), "weight"))  # noqa: B009


class CallsByGetattr(Block):
    def forward(self, x, name="out"):
        return getattr(self, "proj")(x) + getattr(self, name)(x)  # noqa: B009


class ReadsASlice(Block):
    def forward(self, x):
        return x[:2] @ self.proj.weight[:2]


class ReadsInAList(Block):
    def forward(self, x):
        for expert in self.experts:
            x = x + torch.matmul(x, expert.weight)
        return x @ self.experts[0].weight.view(4, 4)


class ReadsInTheBase(ReadsInAMethod):
    def forward(self, x):
        return super().forward(x) + 1


class ReadsIfFused(Block):
    def forward(self, x):
        if self.fused and self.training:
            return self.product(x)
        return self.proj(x)


class ReadsIfTraining(Block):
    def forward(self, x):
        return self.product(x) if self.training else self.proj(x)


class ReadsIfGiven(Block):
    def forward(self, x, state=None):
        if state is None:
            return self.proj(x)
        return self.product(state)


class ReadsBesides(Block):
    def forward(self, x):
        if self.scale > 3 or self.fused:
            return self.product(x)
        if not self.fused:
            return self.proj(x)
        return self.product(x)


class Overwrites(Block):
    def forward(self, x):
        self.proj.weight = self.out.weight
        return self.proj(x)


def flagged(cls):
    block = cls()
    block.fused = True
    return block


def patched():
    """As in Liger and others: one object's forward is replaced."""
    block = Calls()
    block.forward = types.MethodType(Reads.forward, block)
    return block


def hooked():
    """As in accelerate: a partial wraps the old forward."""
    block = Reads()
    old = block.forward
    block.forward = functools.update_wrapper(functools.partial(old), old)
    return block


READS = {
    "calls": (Calls, set(), True),
    "reads": (Reads, {"proj"}, False),
    "method": (ReadsInAMethod, {"proj"}, False),
    "names": (ReadsThroughNames, {"proj"}, False),
    "getattr": (ReadsByGetattr, {"proj"}, False),
    "getattr-call": (CallsByGetattr, set(), True),
    "slice": (ReadsASlice, {"proj"}, False),
    "list": (ReadsInAList, {"experts.*"}, False),
    "super": (ReadsInTheBase, {"proj"}, False),
    "setting-off": (ReadsIfFused, set(), True),
    "setting-on": (lambda: flagged(ReadsIfFused), {"proj"}, True),
    "training": (ReadsIfTraining, {"proj"}, True),
    "optional": (ReadsIfGiven, set(), True),
    "elif": (ReadsBesides, set(), True),
    "elif-on": (lambda: flagged(ReadsBesides), {"proj"}, False),
    "writes": (Overwrites, {"out"}, True),
    "patched": (patched, {"proj"}, False),
    "hooked": (hooked, {"proj"}, False),
    "attention": (lambda: nn.MultiheadAttention(8, 2), {"out_proj"}, False),
}


@pytest.mark.parametrize("make, reads, calls", READS.values(), ids=READS)
def test_reads_and_calls(make, reads, calls):
    forward = Forward(make())
    assert forward.known and forward.reads == reads
    assert ("proj" in forward.calls) is calls


class Router(nn.Module):
    def __init__(self, both=True):
        super().__init__()
        self.weight, self.both = nn.Parameter(torch.zeros(4, 4)), both

    def forward(self, x):
        def inner(y):
            return y

        logits = inner(F.linear(x, self.weight))
        if not self.both:
            return logits
        return logits, logits.argmax(-1)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def forward(self, ids):
        return self.weight[ids]


OWN = {
    "linear": (lambda: nn.Linear(4, 4), True, False),
    "router": (Router, True, True),
    "not-both": (lambda: Router(both=False), True, False),
    "table": (Table, False, False),
    "norm": (lambda: nn.LayerNorm((4, 4)), False, False),
}


@pytest.mark.parametrize("make, multiplies, tuples", OWN.values(), ids=OWN)
def test_own_weight_and_return_type(make, multiplies, tuples):
    forward = Forward(make())
    assert (forward.multiplies, forward.returns_tuple) == (multiplies, tuples)


def test_without_source_nothing_is_found():
    scope = {"nn": nn}
    exec(
        "class Typed(nn.Module):\n    def forward(self, x):\n        return x @ self.a.weight",
        scope,
    )
    forward = Forward(scope["Typed"]())
    assert not forward.known and not forward.reads and not forward.calls
    assert not Forward(nn.ModuleList()).known
