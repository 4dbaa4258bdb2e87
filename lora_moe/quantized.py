"""Makes transformers' Trainer accept a quantized model with experts.

Trainer refuses quantized models whose hf_quantizer is not trainable, unless they have a PEFT adapter.  While
a model has experts, its hf_quantizer is wrapped to report that it is trainable, if gradients pass through the
base.
"""

from __future__ import annotations

from torch import nn


class _Quantizer:
    """Wraps the model's quantizer, and reports that it is trainable."""

    is_trainable = is_qat_trainable = True

    def __init__(self, own):
        self.own = own

    def __getattr__(self, name):
        if name == "own" or name.startswith("__"):  # during copying and unpickling
            raise AttributeError(name)
        return getattr(self.own, name)

    @property
    def __class__(self):  # isinstance as for the wrapped quantizer
        return type(self.own)

    def __reduce__(self):
        return _Quantizer, (self.own,)


def mark(model: nn.Module) -> None:
    """Wrap the quantizer of a model with experts."""
    own = getattr(model, "hf_quantizer", None)
    if own is not None and not isinstance(own, _Quantizer) and passes_gradients(model):
        model.hf_quantizer = _Quantizer(own)


def unmark(model: nn.Module) -> None:
    """Restore the original quantizer."""
    found = vars(model).get("hf_quantizer")
    if isinstance(found, _Quantizer):
        model.hf_quantizer = found.own


def passes_gradients(model: nn.Module) -> bool:
    """Whether gradients pass through the base, according to transformers."""
    return getattr(model.hf_quantizer, "is_trainable", False) or _is_dequantized(model)


def _is_dequantized(model):
    """Whether all weights are plain floating-point tensors, as loaded from GGUF files."""
    tensors = [*model.parameters(), *model.buffers()]
    plain = (type(t) in (nn.Parameter, nn.Buffer) or type(t).__name__ == "Tensor" for t in tensors)
    return all(plain) and all(p.is_floating_point() for p in model.parameters())
