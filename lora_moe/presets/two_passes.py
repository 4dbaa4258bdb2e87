"""two_passes: X-LoRA's first pass, which runs the base before each forward of the model."""

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
    """Run the base before each forward of the model, for layers with a HiddenRouter (see xlora).

    The first pass uses the same arguments without labels, no gradients and no experts.  Its last hidden
    states determine the routing; the model must support output_hidden_states.  A forward with a cache
    raises, because cached tokens would have no first pass.

    Args:
        model: a model with experts, from transformers or with the same arguments.
    Returns:
        A handle; handle.remove() undoes it.
    Raises:
        ValueError: if no layer has a HiddenRouter.
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
