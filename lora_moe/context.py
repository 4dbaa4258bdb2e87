"""What a forward is told from outside, kept per thread: routing, tasks, padding mask, whether experts are on.

    thread.decisions   what `use_routing` and `disable_adapters` say, for each layer (innermost block wins)
    thread.calls       the models that are running, outermost first, and the masks they were called with
    thread.kept        what sequences decided by their prompts, for the tokens that a cache decodes

Nothing here hangs on a module, so modules copy and pickle as usual and one request never sees another's.
An activation checkpoint runs a layer's forward again during backward, in whatever thread and whether or not
the block has ended: what a layer was told is remembered for each checkpoint (`told`).
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from typing import NamedTuple

import torch
from torch import nn

from .interleave import asyncio_task, expect_innermost, expect_own_task
from .recompute import checkpoints_around, recomputing, reentrant_around
from .routing import Routing


class Reading(NamedTuple):
    """What a router of its own reads of the model's call."""

    mask: torch.Tensor | None = None  # (B, L), of the tokens that the layer reads
    labels: torch.Tensor | None = None  # (B, L), see Call


class Decision(NamedTuple):
    """What the caller says of a layer's next forwards; the default leaves everything to its router."""

    routing: Routing | None = None  # in place of the router's, on the layer's device
    mask: torch.Tensor | None = None  # (B, L) or (T,): the tokens that losses and statistics count
    disabled: bool = False  # the base's output alone
    # one for all, or a Routing whose indices (B, 1) or (T, 1) are tasks, on the layer's device
    tasks: Routing | int | None = None
    reading: Reading = Reading()


class Call(NamedTuple):
    """One call of a model, encoder or decoder that has the experts inside."""

    hook: object  # that took it down
    mask: torch.Tensor | None = None  # (B, L), its attention mask
    states: torch.Tensor | None = None  # the encoder's output, which cross-attention reads
    states_mask: torch.Tensor | None = None  # (B, L) of these
    tokens: torch.Tensor | None = None  # (B, L), or (B, L, D) where they are embedded
    labels: torch.Tensor | None = None  # (B, L), -100 for the tokens that stand before an answer
    past: object = None  # its cache
    cached: bool = False  # which holds tokens before these


class _Thread(threading.local):
    def __init__(self):
        self.decisions: dict[nn.Module, Decision] = {}
        self.task = None  # the asyncio task whose block is open
        self.calls: list[Call] = []
        self.generating = 0  # calls of generate()
        self.saving = 0  # calls of save_pretrained()
        self.records = weakref.WeakKeyDictionary()  # layer -> records.Record
        self.kept = weakref.WeakKeyDictionary()  # layer -> _Kept
        self.passes: dict[nn.Module, object] = {}  # LoraMoeMLP that is running -> mlp.Pass


thread = _Thread()
NOTHING = Decision()

# blocks that are open in any thread, for a recompute that cannot know its own
_open: dict[int, dict[nn.Module, Decision]] = {}
# activation checkpoint -> {layer: what its calls in the forward were told}
_checkpoints: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# layer -> Decision of its last training forward without a graph, as reentrant checkpoints run it
_without_graph: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def deciding(decisions: dict[nn.Module, Decision]):
    """Inside, in this thread, each of these layers is told its Decision."""
    before, task = thread.decisions, thread.task
    compiling = torch.compiler.is_compiling()
    own = None
    if not compiling:
        expect_own_task(task)
        thread.task = asyncio_task()
        own = vars(thread)  # this thread's: a generator may end the block in another
    table = thread.decisions = before | decisions
    _open[id(decisions)] = table
    try:
        yield
    finally:
        del _open[id(decisions)]
        if compiling:
            thread.decisions, innermost = before, True
        else:
            innermost = vars(thread) is own and thread.decisions is table
            # what another block found here may be over by now: nobody's decisions stay behind
            own["decisions"], own["task"] = (before, task) if innermost else ({}, None)
    expect_innermost(innermost)


def told(layer: nn.Module, x: torch.Tensor | None = None) -> Decision:
    """What the caller says of this forward of the layer."""
    decision = thread.decisions.get(layer)
    if decision is None:
        decision = NOTHING
    if decision.routing is None and layer.routing_override is not None:
        decision = decision._replace(routing=layer.routing_override)
    if decision.mask is None and layer.mask is not None:
        decision = decision._replace(mask=layer.mask)
    if layer.components is not None:
        decision = _with_batch(layer, x, decision)
    if torch.compiler.is_compiling():
        return decision
    if recomputing():
        return _told_before(layer, decision)
    if torch.is_grad_enabled():
        _remember(layer, decision, checkpoints_around())
    elif layer.training or decision is not NOTHING:
        _without_graph[layer] = decision
        _remember(layer, decision, [*checkpoints_around(), *reentrant_around()])
    return decision


def _with_batch(layer, x, decision):
    """The same with what a router or middle of the layer's own may read."""
    if decision.tasks is None and decision.routing is None and layer.tasks is not None:
        decision = decision._replace(tasks=layer.tasks)
    if thread.calls:
        call = thread.calls[-1]
        of_states = call.states is not None and call.states is x
        reading = Reading(mask_in_call(x), None if of_states else call.labels)
        decision = decision._replace(reading=reading)
    return decision


def mask_in_call(x):
    call = thread.calls[-1]
    of_states = call.states is not None and call.states is x
    return call.states_mask if of_states else call.mask


def _remember(layer, decision, checkpoints):
    for checkpoint in checkpoints:
        calls = _checkpoints.setdefault(checkpoint, {}).setdefault(layer, _Calls())
        calls.decisions.append(decision)


class _Calls:
    """What the calls of one layer in a checkpoint's forward were told, in their order."""

    def __init__(self):
        self.decisions: list[Decision] = []
        self.seen: dict[int, int] = {}  # backward pass -> calls that its recompute has made

    def next(self) -> Decision:
        backward = torch._C._current_graph_task_id()
        i = self.seen.get(backward, 0)
        self.seen[backward] = i + 1
        return self.decisions[min(i, len(self.decisions) - 1)]


def _told_before(layer, decision):
    """For a recompute: the decision of the forward that it repeats.

    A checkpoint inside a checkpoint is made anew by the outer one's recompute, so the innermost one
    that the forward knew decides.
    """
    around = [*checkpoints_around(), *reentrant_around()]
    for checkpoint in around:
        calls = _checkpoints.get(checkpoint, {}).get(layer)
        if calls is not None:
            return calls.next()
    if any(hasattr(checkpoint, "run_function") for checkpoint in around):
        return NOTHING  # a reentrant one, whose forward was told nothing
    return _the_open_one(layer, decision)


def _the_open_one(layer, decision):
    """For a recompute that nothing is known of: the decision of the blocks that are open, if they agree."""
    found = {id(d): d for table in list(_open.values()) if (d := table.get(layer)) is not None}
    if len(found) > 1:
        raise RuntimeError(
            "use_routing: several blocks with different routings are open and this activation checkpoint"
            f" does not say which one its forward ran in; {_WHAT_TO_DO}"
        )
    before = _without_graph.get(layer, decision)
    decision = next(iter(found.values()), decision)._replace(reading=before.reading)
    if not _agree(decision, before):
        raise RuntimeError(
            "use_routing: the layer's forward was told otherwise than what holds during its backward,"
            f" and this activation checkpoint does not say what it ran with; {_WHAT_TO_DO}"
        )
    return decision


_WHAT_TO_DO = (
    "pass use_reentrant=False to the checkpoint, or context_fn=lora_moe.checkpoint_context, or call"
    " backward inside the block"
)


def _agree(a: Decision, b: Decision) -> bool:
    same = _same_routing(a.routing, b.routing) and _same_routing(a.tasks, b.tasks)
    return same and a.disabled == b.disabled


def _same_routing(a, b):
    if a is b or not (isinstance(a, Routing) and isinstance(b, Routing)):
        return a is b or (a is not None and a == b)
    return torch.equal(a.indices, b.indices) and torch.equal(a.weights, b.weights)


def checkpoint_context():
    """For `torch.utils.checkpoint.checkpoint(..., context_fn=lora_moe.checkpoint_context)`.

    The recompute then sees what `use_routing` said to the forward.  Checkpoints with
    use_reentrant=False do so by themselves; this is for a PyTorch that no longer shows which
    checkpoint is running.

    Returns:
        Two context managers, for the forward and for the recompute.
    """
    return contextlib.nullcontext(), deciding(dict(thread.decisions))


# --- one decision per sample, for all of the sample's tokens ---------------------------------------


def fit_rows(routing: Routing, x: torch.Tensor, name: str = "routing") -> Routing:
    """The caller's routing for x's tokens: as it is, or each row for equally many tokens in a row.

    Inside a model a layer may see each sample several times in a row: beams, return sequences,
    the patches of its images.  A layer that is called by itself sees the samples as they are.
    """
    tokens, rows = math.prod(x.shape[:-1]), routing.indices.shape[0]
    if rows == tokens:
        return routing
    if _is_sequence_first(x, rows):
        return routing.tile(tokens // rows)
    _expect_samples(rows, x, name)
    return routing.repeat(tokens // rows)


def sample_rows(routing: Routing, x: torch.Tensor, name: str = "routing") -> Routing | None:
    """The caller's routing where fit_rows would repeat each row for several tokens in a row; else None."""
    rows = routing.indices.shape[0]
    if rows == math.prod(x.shape[:-1]) or _is_sequence_first(x, rows):
        return None
    _expect_samples(rows, x, name)
    return routing


def _expect_samples(rows, x, name):
    samples = x.shape[0]
    inside = thread.calls or thread.generating or recomputing()
    if rows == 0 or samples % rows or (rows != samples and not inside):
        raise ValueError(
            f"{name}: expected {math.prod(x.shape[:-1])} rows, one per token, or {samples}, one per sample,"
            f" for x {tuple(x.shape)}, got {rows}; see lora_moe.use_routing"
        )


def _is_sequence_first(x, rows):
    """Whether x is (L, B, D) for one row per sample, as inside XLNet: its model was called with (B, L)."""
    tokens = thread.calls[-1].tokens if thread.calls else None
    if tokens is None or tokens.dim() < 2 or x.dim() != 3:
        return False
    B, L = tokens.shape[:2]
    return rows == B != L and x.shape[:2] == (L, B)
