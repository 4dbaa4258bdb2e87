"""What inject() hangs on a model, and remove() takes off again.

    hooks           read the padding mask off the model's arguments, check the batch against task ids, and
                    watch the first forwards for what would be lost in silence
    generate        marks that samples may stand several times in a row (beams, return sequences)
    save_pretrained writes the base's weights under the base's own names, and the experts beside them
    hf_quantizer    of a quantized model tells Trainer that there is something to train

Everything is an object that holds its model, so that a copied or pickled model has its own.
"""

from __future__ import annotations

from torch import nn

from . import quantized
from .model_hooks import AfterCall, BeforeCall
from .steering import injected
from .usage_warnings import ParentRan, Watch
from .wrappers import WRAPPERS, Wrapper


def attach(model: nn.Module, *, saves: bool = True) -> None:
    """Hang everything on a model that has experts; anew where it was there already.

    Without `saves`, as where PEFT saves the experts, save_pretrained stays the model's own.
    """
    detach(model)
    watch, decoders = Watch(), _decoders(model)
    for caller in _callers(model):
        before = BeforeCall(caller, watch if caller is model else None, caller in decoders)
        caller.register_forward_pre_hook(before, with_kwargs=True)
        caller.register_forward_hook(AfterCall(before), always_call=True)
    model.register_forward_hook(watch)
    for owner in (model, *_models_inside(model)):
        quantized.mark(owner)
        for name, wrapper in WRAPPERS.items():
            if (saves or not wrapper.saves) and callable(getattr(type(owner), name, None)):
                setattr(owner, name, wrapper(owner))


def _callers(model) -> dict[nn.Module, None]:
    """The model, and what inside of it is called with a mask of its own."""
    callers = dict.fromkeys((model, *_models_inside(model)))
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        for name in ("get_encoder", "get_decoder"):
            if (child := _submodule(model, name)) is not None:
                callers[child] = None
    return callers


def _decoders(model) -> list[nn.Module]:
    """Of encoder-decoders: all that they read stands in the answer."""
    owners = [m for m in model.modules() if hasattr(type(m), "main_input_name")]
    owners = [m for m in owners if getattr(m.config, "is_encoder_decoder", False)]
    return [child for m in owners if (child := _submodule(m, "get_decoder")) not in (None, m)]


def _models_inside(model) -> list[nn.Module]:
    """The models of transformers with experts in them: what a wrapper, LLaVA or a Trainer may call."""
    return [
        m
        for m in model.modules()
        if m is not model and hasattr(type(m), "main_input_name") and injected(m)
    ]


def detach(model: nn.Module) -> None:
    ours = (BeforeCall, AfterCall, Watch, ParentRan)
    for module in model.modules():
        quantized.unmark(module)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, h in hooks.items() if isinstance(h, ours)]:
                del hooks[key]
                for flags in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
                    getattr(module, flags).pop(key, None)
        for name in WRAPPERS:
            if isinstance(vars(module).get(name), Wrapper):
                delattr(module, name)


def _submodule(model, name):
    try:
        return getattr(model, name)()
    except (AttributeError, TypeError, NotImplementedError):
        return None
