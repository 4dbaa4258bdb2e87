"""Per-thread state that a forward reads: routing overrides, tasks, padding mask, disabled experts.

    thread.decisions   per layer, what `use_routing` and `disable_adapters` set (the innermost block wins)
    thread.calls       the running models, outermost first, with the masks that they were called with
    thread.kept        routings decided by a sequence's prompt, reused when decoding with a cache

None of this is stored on modules, so modules copy and pickle as usual and requests are independent.  An
activation checkpoint reruns a layer's forward during backward, possibly in another thread and after the block
has ended; so the state of a forward is recorded for each checkpoint (`told`).
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
    """Inputs of the model's call that routers other than the token router may read."""

    mask: torch.Tensor | None = None  # (B, L), for the tokens in the layer's input
    labels: torch.Tensor | None = None  # (B, L), see Call


class Decision(NamedTuple):
    """The caller's settings for a layer's next forwards; by default the router decides."""

    routing: Routing | None = None  # replaces the router's, on the layer's device
    mask: torch.Tensor | None = None  # (B, L) or (T,): the tokens that losses and statistics count
    disabled: bool = False  # only the base's output
    # one task for all tokens, or a Routing whose indices (B, 1) or (T, 1) are tasks, on the layer's device
    tasks: Routing | int | None = None
    reading: Reading = Reading()


class Call(NamedTuple):
    """One call of a model, encoder or decoder that contains experts."""

    hook: object  # the hook that recorded the call
    mask: torch.Tensor | None = None  # (B, L), its attention mask
    states: torch.Tensor | None = None  # the encoder's output, read by cross-attention
    states_mask: torch.Tensor | None = None  # (B, L), of `states`
    tokens: torch.Tensor | None = None  # (B, L), or (B, L, D) if embedded
    labels: torch.Tensor | None = None  # (B, L), -100 for tokens before the answer
    past: object = None  # the cache
    cached: bool = False  # whether the cache holds earlier tokens


class _Thread(threading.local):
    def __init__(self):
        self.decisions: dict[nn.Module, Decision] = {}
        self.task = None  # the asyncio task that opened the block
        self.calls: list[Call] = []
        self.generating = 0  # calls of generate()
        self.saving = 0  # calls of save_pretrained()
        self.records = weakref.WeakKeyDictionary()  # layer -> records.Record
        self.kept = weakref.WeakKeyDictionary()  # layer -> _Kept
        self.passes: dict[nn.Module, object] = {}  # running LoraMoeMLP -> mlp.Pass


thread = _Thread()
NOTHING = Decision()

# open blocks of all threads, for a recompute that cannot find its own
_open: dict[int, dict[nn.Module, Decision]] = {}
# activation checkpoint -> {layer: the decisions of its calls in the forward}
_checkpoints: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# layer -> Decision of its last training forward without a graph, as run by reentrant checkpoints
_without_graph: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def deciding(decisions: dict[nn.Module, Decision]):
    """Set the Decision of each of these layers inside the block, in this thread."""
    before, task = thread.decisions, thread.task
    compiling = torch.compiler.is_compiling()
    own = None
    if not compiling:
        expect_own_task(task)
        thread.task = asyncio_task()
        own = vars(thread)  # this thread's: a generator may end the block in another thread
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
            # the enclosing block may have ended meanwhile: leave no decisions behind
            own["decisions"], own["task"] = (before, task) if innermost else ({}, None)
    expect_innermost(innermost)


def told(layer: nn.Module, x: torch.Tensor | None = None) -> Decision:
    """The Decision for this forward of the layer."""
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
    """Add the inputs that the layer's router or middle may read."""
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
    """The decisions of one layer's calls in a checkpoint's forward, in order."""

    def __init__(self):
        self.decisions: list[Decision] = []
        self.seen: dict[int, int] = {}  # backward pass -> number of calls in its recompute

    def next(self) -> Decision:
        backward = torch._C._current_graph_task_id()
        i = self.seen.get(backward, 0)
        self.seen[backward] = i + 1
        return self.decisions[min(i, len(self.decisions) - 1)]


def _told_before(layer, decision):
    """For a recompute: the decision of the forward that it repeats.

    The outer checkpoint's recompute creates nested checkpoints anew, so the innermost checkpoint that
    already existed in the forward decides.
    """
    around = [*checkpoints_around(), *reentrant_around()]
    for checkpoint in around:
        calls = _checkpoints.get(checkpoint, {}).get(layer)
        if calls is not None:
            return calls.next()
    if any(hasattr(checkpoint, "run_function") for checkpoint in around):
        return NOTHING  # a reentrant one, whose forward had the default decision
    return _the_open_one(layer, decision)


def _the_open_one(layer, decision):
    """For a recompute without a record: the decision of the open blocks, if they agree."""
    found = {id(d): d for table in list(_open.values()) if (d := table.get(layer)) is not None}
    if len(found) > 1:
        raise RuntimeError(
            "use_routing: several blocks with different routings are open, and this activation checkpoint"
            f" does not record which one its forward ran in; {_WHAT_TO_DO}"
        )
    before = _without_graph.get(layer, decision)
    decision = next(iter(found.values()), decision)._replace(reading=before.reading)
    if not _agree(decision, before):
        raise RuntimeError(
            "use_routing: the routing of the layer's forward differs from the one set during its backward,"
            f" and this activation checkpoint does not record the forward's; {_WHAT_TO_DO}"
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

    The recompute then uses the `use_routing` settings of the forward.  Checkpoints with
    use_reentrant=False do so automatically; this is for PyTorch versions that do not expose the
    running checkpoint.

    Returns:
        Two context managers, for the forward and for the recompute.
    """
    return contextlib.nullcontext(), deciding(dict(thread.decisions))


# --- one decision per sample, for all of the sample's tokens ---------------------------------------


def fit_rows(routing: Routing, x: torch.Tensor, name: str = "routing") -> Routing:
    """The caller's routing for x's tokens: unchanged if per token, else each row repeated.

    Inside a model, consecutive rows of x may belong to one sample: beams, return sequences, image
    patches.  A layer that is called directly must get one row per sample or token.
    """
    tokens, rows = math.prod(x.shape[:-1]), routing.indices.shape[0]
    if rows == tokens:
        return routing
    if _is_sequence_first(x, rows):
        return routing.tile(tokens // rows)
    _expect_samples(rows, x, name)
    return routing.repeat(tokens // rows)


def sample_rows(routing: Routing, x: torch.Tensor, name: str = "routing") -> Routing | None:
    """The caller's routing if fit_rows would repeat its rows, else None."""
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
    """Whether x is (L, B, D) and the model was called with (B, L), as in XLNet."""
    tokens = thread.calls[-1].tokens if thread.calls else None
    if tokens is None or tokens.dim() < 2 or x.dim() != 3:
        return False
    B, L = tokens.shape[:2]
    return rows == B != L and x.shape[:2] == (L, B)
