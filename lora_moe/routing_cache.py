"""Routings decided by sequences' prompts, for decoding with a cache; stored per thread and layer."""

from __future__ import annotations

import weakref

import torch

from .context import thread
from .recompute import recomputing
from .routing import Routing


def cache_in_use():
    """The key-value cache of the current model call if it holds earlier tokens, else None."""
    call = thread.calls[-1] if thread.calls and not recomputing() else None
    return call.past if call is not None and call.cached else None


def kept_decision(layer, rows: int) -> Routing | None:
    """The routing of the layer's prompts when decoding with a cache, else None; raises if unknown.

    It belongs to the cache, or to the last forward if the model created the cache itself.
    """
    past = cache_in_use()
    if past is None:
        return None
    routing = layer.compiled_kept
    if routing is None and layer in thread.kept:
        kept = thread.kept[layer]
        routing = kept.of.get(past, kept.last)
    if routing is None or routing.indices.shape[0] != rows:
        have = 0 if routing is None else routing.indices.shape[0]
        raise ValueError(
            f"past_key_values: expected the cache of the last {have} sequences, got {rows}"
        )
    return routing


def keep(layer, routing: Routing) -> None:
    """Store the routing of the layer's sequences, for decoding with a cache."""
    if recomputing():
        return
    routing = Routing(routing.indices, routing.weights.detach(), routing.counts)
    if torch.compiler.is_compiling():
        layer.compiled_kept = routing
        return
    layer.compiled_kept = None
    kept = thread.kept.setdefault(layer, _Kept())
    kept.last, past = routing, thread.calls[-1].past if thread.calls else None
    if hasattr(past, "get_seq_length"):
        kept.of[past] = routing


class _Kept:
    def __init__(self):
        self.last: Routing | None = None
        self.of = weakref.WeakKeyDictionary()  # cache -> Routing
