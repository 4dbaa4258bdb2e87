"""Hooks and method wrappers that inject() adds to a model and remove() takes off.

    hooks           read the padding mask from the model's arguments, check the batch against task ids, and
                    warn in the first forwards about misuse that would otherwise be silent
    generate        records that samples may be repeated in the batch (beams, return sequences)
    save_pretrained saves the base's weights under their original names, and the experts in a separate file
    hf_quantizer    of a quantized model: tells Trainer that the model is trainable

Each hook and wrapper is an object that holds its model, so copied and pickled models get their own.
"""

from __future__ import annotations

from torch import nn

from . import quantized
from .model_hooks import AfterCall, BeforeCall
from .steering import injected
from .usage_warnings import ParentRan, Watch
from .wrappers import WRAPPERS, Wrapper


def attach(model: nn.Module, *, saves: bool = True) -> None:
    """Add the hooks and wrappers to a model with experts, replacing existing ones.

    With saves=False (PEFT saves the experts), save_pretrained is not wrapped.
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
    """The model, and the modules in it that are called with their own mask."""
    callers = dict.fromkeys((model, *_models_inside(model)))
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        for name in ("get_encoder", "get_decoder"):
            if (child := _submodule(model, name)) is not None:
                callers[child] = None
    return callers


def _decoders(model) -> list[nn.Module]:
    """Decoders of encoder-decoder models: all of their tokens belong to the answer."""
    owners = [m for m in model.modules() if hasattr(type(m), "main_input_name")]
    owners = [m for m in owners if getattr(m.config, "is_encoder_decoder", False)]
    return [child for m in owners if (child := _submodule(m, "get_decoder")) not in (None, m)]


def _models_inside(model) -> list[nn.Module]:
    """Inner transformers models with experts, which a wrapper, LLaVA or a Trainer may call directly."""
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
