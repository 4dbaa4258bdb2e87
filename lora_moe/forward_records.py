"""Records of each layer's forwards, for losses and statistics: one Record per layer and thread.

    last, training, evaluation   the last forward in any mode, in training mode, in evaluation mode
    pending                      forwards with a graph that the auxiliary loss still has to count

A step may have several forwards (DPO, accumulated micro-batches), and the loss may be read twice.  So a
forward leaves `pending` only when a later one with a graph runs after its loss was read or its backward ran.
Forwards in evaluation mode are pending only if none in training mode is.
Under torch.compile only the last forward is recorded.
"""

from __future__ import annotations

import weakref

import torch

from .context import thread
from .notices import tell_once
from .routing import Routing
from .tokens import Tokens

MAX_PENDING = 16


class Run:
    """One forward of a layer: its routing, and which tokens are not padding."""

    __slots__ = ("__weakref__", "paid", "read", "routing", "tokens", "training")

    def __init__(self, routing: Routing, tokens: Tokens, training: bool):
        self.routing, self.tokens, self.training = routing, tokens, training
        self.read = False  # aux_loss has read it with gradients enabled
        self.paid = False  # its backward has run

    @property
    def has_graph(self) -> bool:
        return self.routing.lse is not None and self.routing.lse.requires_grad


class Record:
    def __init__(self):
        self.last: Run | None = None
        self.training: Run | None = None
        self.evaluation: Run | None = None
        self.pending: list[Run] = []
        self.read = False  # aux_loss has been called
        self.unread = 0  # consecutive backward passes whose auxiliary loss was not read

    def remember(self, run: Run) -> None:
        self.last = run
        if run.training:
            self.training = run
        else:
            self.evaluation = run

    def expect_loss(self, run: Run) -> None:
        settled = [i for i, r in enumerate(self.pending) if r.read or r.paid]
        if settled:
            unread = [r for r in self.pending if r.paid and not r.read]
            self.unread = self.unread + 1 if unread else 0
            del self.pending[: settled[-1] + 1]
        if run.training:
            self.pending = [r for r in self.pending if r.training]
        elif any(r.training for r in self.pending):
            return  # an evaluation within a step, without no_grad
        if len(self.pending) == MAX_PENDING:
            tell_once(
                "pending",
                f"{MAX_PENDING} forwards with gradients ran without a backward or aux_loss(model):"
                " aux_loss no longer counts the oldest; run forwards that need no backward under"
                " torch.no_grad()",
            )
            del self.pending[0]
        self.pending.append(run)
        node = run.routing.lse.grad_fn
        if node is not None:
            node.register_prehook(_Paid(run))


class _Paid:
    """A hook on the graph's node, with a weak reference so that it does not keep the forward alive."""

    def __init__(self, run):
        self.run = weakref.ref(run)

    def __call__(self, _grads):
        run = self.run()
        if run is not None:
            run.paid = True


def _own(layer):
    record = thread.records.get(layer)
    if record is None:
        record = thread.records[layer] = Record()
    return record


def record_of(layer) -> Record:
    """This thread's record, updated from the layer's compiled forward; created if there is none."""
    record = _own(layer)
    if layer.compiled_run is not None:
        record.remember(layer.compiled_run)
    if layer.compiled_graph is not None and layer.compiled_graph not in record.pending:
        record.pending = [layer.compiled_graph]
    return record


def remember(layer, routing: Routing, tokens: Tokens) -> None:
    """Record a forward, except during export."""
    run = Run(routing, tokens, layer.training)
    owes = layer.config.has_aux_loss and run.has_graph
    if torch.compiler.is_compiling():
        if not torch.compiler.is_exporting():
            layer.compiled_run = run
            if owes:
                layer.compiled_graph = run
        return
    if layer.compiled_run is not None or layer.compiled_graph is not None:
        layer.compiled_run = layer.compiled_graph = None
    record = _own(layer)
    record.remember(run)
    if owes:
        record.expect_loss(run)


def forget(layer) -> None:
    """Delete this thread's record of the layer."""
    layer.compiled_run = layer.compiled_graph = None
    thread.records.pop(layer, None)
