"""Activation checkpoints: whether one runs a forward again, and which ones a call stands in.

PyTorch has no public names for it; where a version shows nothing, no checkpoint is found.
"""

from __future__ import annotations

import sys
import weakref

import torch


def recomputing() -> bool:
    """Inside a backward pass: an activation checkpoint runs the forward again.

    What it would record says nothing new and would keep the new activations alive.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def checkpoints_around() -> list:
    """The non-reentrant activation checkpoints around this call, innermost first.

    PyTorch has no public name for them: their hooks on saved tensors hold them in a closure.  Hooks
    form a stack of which only the top can be seen, so it is taken down and put up again.
    """
    autograd = torch._C._autograd
    try:
        top = autograd._top_saved_tensors_default_hooks
        enabled = autograd._saved_tensors_hooks_is_enabled()
    except AttributeError:
        return []
    found, taken = [], []
    try:
        while (hooks := top(True)) is not None:
            if (checkpoint := _checkpoint_of(hooks)) is not None:
                found.append(checkpoint)
            if not enabled:  # they could not be put up again
                break
            autograd._pop_saved_tensors_default_hooks()
            taken.append(hooks)
    finally:
        for hooks in reversed(taken):
            autograd._push_saved_tensors_default_hooks(*hooks)
    return found


def _checkpoint_of(hooks):
    """The checkpoint whose hooks on saved tensors these are, or None."""
    pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])  # the recompute's is wrapped
    for cell in getattr(pack, "__closure__", None) or ():
        held = cell.cell_contents
        held = held() if isinstance(held, weakref.ref) else held
        if hasattr(held, "recompute_fn"):
            return held
    return None


def reentrant_around():
    """The contexts of the autograd Functions around this call, innermost first.

    A reentrant checkpoint is one: its forward, and its backward, which runs the forward again, have the same
    context.  Only the stack knows it.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_varnames[:1] == ("ctx",) and code.co_name in ("forward", "backward"):
            context = frame.f_locals["ctx"]
            if isinstance(context, torch.autograd.function.FunctionCtx):
                yield context
        frame = frame.f_back
