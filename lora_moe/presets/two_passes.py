"""X-LoRA's first pass: the base alone, before each forward of the model."""

from __future__ import annotations

import inspect
import threading

import torch
from torch import nn

from ..routers import HiddenRouter
from ..routers.hidden import show
from ..steering import disable_adapters, injected

_thread = threading.local()


def two_passes(model: nn.Module):
    """Run the base before each forward of the model, for its layers with a HiddenRouter (see xlora).

    The first pass has the same arguments without labels, no gradient and no experts; its last hidden states,
    which the model gives by output_hidden_states, decide.  There is no cache: a forward after a cached one
    raises, as the tokens before it would have no first pass.

    Args:
        model: with experts in it, a model of transformers or one with its arguments.
    Returns:
        A handle; handle.remove() ends it.
    Raises:
        ValueError: no layer has a HiddenRouter.
    """
    if not _readers(model):
        raise ValueError("model: expected layers with a HiddenRouter, got none")
    return model.register_forward_pre_hook(_first_pass, with_kwargs=True)


def _readers(model):
    layers = injected(model).values()
    return [layer for layer in layers if isinstance(layer.config.router, HiddenRouter)]


def _first_pass(model, args, kwargs):
    if getattr(_thread, "inside", False):
        return
    names = inspect.signature(model.forward).parameters
    given = dict(zip(names, args)) | kwargs
    past = given.pop("past_key_values", None)
    if past is not None and int(past.get_seq_length()) > 0:
        raise RuntimeError(
            "past_key_values: the first pass of X-LoRA needs all tokens; pass use_cache=False"
        )
    given.pop("labels", None)
    given |= {"output_hidden_states": True, "use_cache": False, "return_dict": True}
    _thread.inside = True
    try:
        with torch.no_grad(), disable_adapters(model):
            states = model(**given).hidden_states[-1]
    finally:
        _thread.inside = False
    show(_readers(model), states)
