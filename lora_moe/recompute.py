"""Detects activation checkpoints: whether one is recomputing, and which ones enclose a call.

PyTorch has no public API for this; in versions without the private one, no checkpoint is found.
"""

from __future__ import annotations

import sys
import weakref

import torch


def recomputing() -> bool:
    """Whether this forward runs in a backward pass, as the recompute of an activation checkpoint.

    Recording it again would be redundant and would keep its activations alive.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def checkpoints_around() -> list:
    """The non-reentrant activation checkpoints around this call, innermost first.

    They are in the closures of their saved-tensor hooks.  These hooks form a stack of which only the top
    is readable, so it is popped and then restored.
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
            if not enabled:  # they could not be restored
                break
            autograd._pop_saved_tensors_default_hooks()
            taken.append(hooks)
    finally:
        for hooks in reversed(taken):
            autograd._push_saved_tensors_default_hooks(*hooks)
    return found


def _checkpoint_of(hooks):
    """The checkpoint that these saved-tensor hooks belong to, or None."""
    pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])  # the recompute's is wrapped
    for cell in getattr(pack, "__closure__", None) or ():
        held = cell.cell_contents
        held = held() if isinstance(held, weakref.ref) else held
        if hasattr(held, "recompute_fn"):
            return held
    return None


def reentrant_around():
    """The contexts of the autograd Functions around this call, innermost first.

    A reentrant checkpoint is one: its forward and its backward, which reruns the forward, share a context.
    It can only be found on the call stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_varnames[:1] == ("ctx",) and code.co_name in ("forward", "backward"):
            context = frame.f_locals["ctx"]
            if isinstance(context, torch.autograd.function.FunctionCtx):
                yield context
        frame = frame.f_back
