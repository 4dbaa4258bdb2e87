"""What a layer remembers of its forwards, for losses and statistics: one Record per layer and thread.

    last, training, evaluation   the last forward of all, in training mode, in evaluation mode
    pending                      the forwards with a graph whose auxiliary loss is still to be paid

A forward leaves `pending` when a later one with a graph arrives after its loss was read or its backward
ran: a step may hold several forwards (DPO, accumulated micro-batches), and reading twice is harmless.
Forwards in evaluation mode wait only where none in training mode does.
Under torch.compile a layer remembers its last forward only.
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
    """One forward of a layer: its routing, and how to tell which tokens count."""

    __slots__ = ("__weakref__", "paid", "read", "routing", "tokens", "training")

    def __init__(self, routing: Routing, tokens: Tokens, training: bool):
        self.routing, self.tokens, self.training = routing, tokens, training
        self.read = False  # aux_loss has seen it, to train
        self.paid = False  # its backward ran

    @property
    def has_graph(self) -> bool:
        return self.routing.lse is not None and self.routing.lse.requires_grad


class Record:
    def __init__(self):
        self.last: Run | None = None
        self.training: Run | None = None
        self.evaluation: Run | None = None
        self.pending: list[Run] = []
        self.read = False  # aux_loss has been asked for
        self.unread = 0  # backward passes in a row whose auxiliary loss nobody read

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
            return  # an evaluation in the middle of a step, without no_grad
        if len(self.pending) == MAX_PENDING:
            tell_once(
                "pending",
                f"{MAX_PENDING} forwards with gradients ran and neither backward nor aux_loss(model)"
                " followed: the oldest no longer counts in the auxiliary loss; run forwards without a"
                " backward under torch.no_grad()",
            )
            del self.pending[0]
        self.pending.append(run)
        node = run.routing.lse.grad_fn
        if node is not None:
            node.register_prehook(_Paid(run))


class _Paid:
    """A hook on the graph's node: it must not keep the forward alive that it tells of."""

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
    """This thread's, with what a compiled forward left on the layer; a new one before any forward."""
    record = _own(layer)
    if layer.compiled_run is not None:
        record.remember(layer.compiled_run)
    if layer.compiled_graph is not None and layer.compiled_graph not in record.pending:
        record.pending = [layer.compiled_graph]
    return record


def remember(layer, routing: Routing, tokens: Tokens) -> None:
    """Note a forward; nothing is noted while a graph is exported."""
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
    """As if the layer had not run, in this thread."""
    layer.compiled_run = layer.compiled_graph = None
    thread.records.pop(layer, None)
