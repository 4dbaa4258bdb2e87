"""A quantized model of transformers that has experts: Trainer takes it as one with something to train.

Trainer asks model.hf_quantizer whether the weights themselves can be trained, and knows of no adapters but
PEFT's.  While a model has experts, its hf_quantizer answers for these: they train where gradients pass
through the base.
"""

from __future__ import annotations

from torch import nn


class _Quantizer:
    """The model's own, but for what Trainer asks."""

    is_trainable = is_qat_trainable = True

    def __init__(self, own):
        self.own = own

    def __getattr__(self, name):
        if name == "own" or name.startswith("__"):  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.own, name)

    @property
    def __class__(self):  # isinstance must say what it says of the model's own
        return type(self.own)

    def __reduce__(self):
        return _Quantizer, (self.own,)


def mark(model: nn.Module) -> None:
    """The model has experts now."""
    own = getattr(model, "hf_quantizer", None)
    if own is not None and not isinstance(own, _Quantizer) and passes_gradients(model):
        model.hf_quantizer = _Quantizer(own)


def unmark(model: nn.Module) -> None:
    """It has none any more."""
    found = vars(model).get("hf_quantizer")
    if isinstance(found, _Quantizer):
        model.hf_quantizer = found.own


def passes_gradients(model: nn.Module) -> bool:
    """Whether a gradient of the inputs comes out of the base, as far as transformers knows."""
    return getattr(model.hf_quantizer, "is_trainable", False) or _is_dequantized(model)


def _is_dequantized(model):
    """Plain floating-point weights throughout, as a GGUF file gives."""
    tensors = [*model.parameters(), *model.buffers()]
    plain = (type(t) in (nn.Parameter, nn.Buffer) or type(t).__name__ == "Tensor" for t in tensors)
    return all(plain) and all(p.is_floating_point() for p in model.parameters())
