"""All private APIs of transformers and TRL that lora_moe.hf uses, in one place.

tests/stack/test_trainer.py checks each item against the installed versions; docs/trainer.md lists the tested
versions.
"""

from __future__ import annotations

import contextlib
import sys

from torch import nn

from .. import quantized

# private methods of Trainer that the mixin overrides
OVERRIDDEN = ("_load_from_checkpoint", "_load_best_model", "_push_from_checkpoint")


def divides_loss(trainer, num_items_in_batch) -> bool:
    """Whether Trainer.training_step divides the result of compute_loss by the accumulation steps.

    transformers 5.19 and later have the class attribute loss_is_scaled_for_ga; its default None, and all
    earlier versions, mean the expression below.
    """
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = by_model or trainer.compute_loss_func is not None
    return not scaled


@contextlib.contextmanager
def outermost_loss(trainer, finish):
    """Inside the block, this trainer's compute_loss returns finish(its result, num_items_in_batch).

    An override of compute_loss need not call super() for this, and the order of bases does not matter.
    """
    own = vars(trainer).get("compute_loss")
    compute = trainer.compute_loss

    def finished(*args, num_items_in_batch=None, **kwargs):
        result = compute(*args, num_items_in_batch=num_items_in_batch, **kwargs)
        return finish(result, num_items_in_batch)

    trainer.compute_loss = finished
    try:
        yield
    finally:
        if own is None:
            del trainer.compute_loss
        else:
            trainer.compute_loss = own


def checkpointing_kwargs(args) -> str:
    """The name of the argument with activation checkpointing options, which changed in 5.20."""
    new, old = "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"
    return new if hasattr(args, new) else old


def checkpoints_activations(args) -> bool:
    return bool(
        getattr(args, "activation_checkpointing", False)
        or getattr(args, "gradient_checkpointing", False)
    )


def expect_gradients(model) -> None:
    """Raise ValueError for a quantized model that transformers reports as not trainable."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not getattr(model, "is_quantized", False) or quantizer is None:
        return
    if not quantized.passes_gradients(model):
        method = getattr(quantizer.quantization_config, "quant_method", "its method")
        raise ValueError(
            f"model: expected a quantization with support for gradients, got {method}, which"
            " transformers reports as not trainable; load the base differently, for example in 4 bits"
            " with bitsandbytes, or dequantized"
        )


# functions in TRL's modules that create a second model from the policy's id, or copy the policy
REFERENCE_MAKERS = ("create_model_from_path", "create_reference_model")


@contextlib.contextmanager
def references_made_by(make, trainer_class):
    """Inside the block, TRL's trainers use `make(id or policy)` as reference instead of a second model.

    DPO, GRPO, KTO and RLOO each call one of REFERENCE_MAKERS by its name in their own module.  Models that
    they load for other purposes have an architecture= or a second argument.
    """
    patched = []
    for kind in trainer_class.__mro__:
        module = sys.modules.get(kind.__module__)
        if module is None or not kind.__module__.startswith("trl."):
            continue
        for name in REFERENCE_MAKERS:
            load = vars(module).get(name)
            if load is not None:
                patched.append((module, name, load))
                setattr(module, name, _Maker(load, make))
    try:
        yield
    finally:
        for module, name, load in patched:
            setattr(module, name, load)


class _Maker:
    def __init__(self, load, make):
        self.load, self.make = load, make

    def __call__(self, source, *args, **kwargs):
        made = None if args or "architecture" in kwargs else self.make(source)
        return self.load(source, *args, **kwargs) if made is None else made


@contextlib.contextmanager
def keeps_dtypes(model):
    """Restore the dtypes and values of trainable parameters on exit.

    TRL's trainers cast all trainable parameters on a quantized base to bf16, including routers.
    """
    if not isinstance(model, nn.Module) or not getattr(model, "is_quantized", False):
        yield
        return
    before = {p: p.data for p in model.parameters() if p.requires_grad}
    yield
    for parameter, data in before.items():
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)
