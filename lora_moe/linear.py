"""Recognizes linear modules and FFNs, and their sizes.

An FFN has linear layers D -> F (or D -> 2 F, gate and up fused) and one F -> D, no other matrix, and only
elementwise functions between them: gate / up / down, fc1 / fc2, wi / wo and others.
"""

from __future__ import annotations

import re

from torch import nn

from .sharded import whole_shape

# if F = D, sizes alone do not distinguish an FFN from attention
_NAMED = re.compile(r"mlp|ffn|feed_?forward|dense_?(relu|act|gated)", re.IGNORECASE)


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(D_in, D_out) of a module that behaves like nn.Linear, else None."""
    D_in, D_out = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if isinstance(D_in, int) and isinstance(D_out, int):
        return (D_in, D_out) if D_in > 0 and D_out > 0 else None  # not known yet in a lazy module
    weight = getattr(module, "weight", None)
    shape = whole_shape(weight) if hasattr(weight, "ndim") else ()
    if isinstance(module, nn.Embedding) or len(shape) != 2:
        return None
    D_out, D_in = shape
    transposed = getattr(module, "nf", None) == D_in  # transformers' Conv1D
    return (D_out, D_in) if transposed else (D_in, D_out)


def linears_of(module: nn.Module) -> dict[str, tuple[int, int]]:
    """{name: (D_in, D_out)} of its direct linear children, under their first names."""
    sizes = {name: linear_features(child) for name, child in module.named_children()}
    return {name: size for name, size in sizes.items() if size is not None}


def ffn_width(module: nn.Module) -> int | None:
    """D of an FFN, else None."""
    last = last_of_ffn(module)
    return None if last is None else linears_of(module)[last][1]


def last_of_ffn(module: nn.Module) -> str | None:
    """The name of an FFN's linear layer F -> D, else None."""
    sizes = linears_of(module)
    own = {p for name in sizes for p in module.get_submodule(name).parameters()}
    if any(p.ndim > 1 for p in module.parameters() if p not in own):
        return None  # a layer with attention, or a whole model
    for name, (F, D) in reversed(sizes.items()):  # of two candidates, the second is the last layer
        others = [size for other, size in sizes.items() if other != name]
        fits = all(d == D and f in (F, 2 * F) for d, f in others)
        if others and fits and (F != D or _NAMED.search(type(module).__name__)):
            return name
    return None
