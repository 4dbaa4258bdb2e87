"""Weight: adds a merged delta to the weight of a base layer, or gives the reason why it cannot.

nn.Linear has W (D_out, D_in), transformers' Conv1D its transpose.  Other classes are not supported, since
their use of the weight is unknown.
"""

from __future__ import annotations

import torch
from torch import nn

from .layers import LoraMoeLinear
from .reference import accumulator
from .sharded import is_sharded, is_stepped_by_zero

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Weight:
    """The weight of layer.base_layer.

    Attributes:
        refusal: why the weight cannot be changed, or None if it can.
    """

    def __init__(self, model: nn.Module, path: str, layer: LoraMoeLinear):
        self.path, self.base = path, layer.base_layer
        self.refusal = self._refusal(model, layer)

    def add(self, delta: torch.Tensor, write: bool) -> None:
        """Compute W + delta, rounded once to W's dtype; with `write`, store it.

        Raises:
            ValueError: if a value of the sum is not finite in W's dtype.
        """
        weight = self.base.weight
        delta = delta.T if _is_transposed(self.base) else delta
        dtype = accumulator(torch.promote_types(weight.dtype, delta.dtype))
        merged = (weight.to(dtype) + delta.to(weight.device, dtype)).to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(
                f"{self.path}: expected a finite sum in {weight.dtype}, got NaN or infinity"
            )
        if write:
            weight.copy_(merged)

    def _refusal(self, model, layer):
        base = self.base
        weight = base._parameters.get("weight")
        if _kind(base) is None or weight is None:
            return (
                f"a {type(base).__name__} has an unknown weight format (quantized or custom): load the"
                " base dequantized, or merge into='lora'"
            )
        if base._forward_hooks or base._forward_pre_hooks:
            return "it has forward hooks, which the merge would affect: remove them, or merge into='lora'"
        if is_sharded(weight) or is_stepped_by_zero(weight) or weight.dim() != 2:
            return "its weight is sharded: load the adapter into an unsharded model and merge in one process"
        if weight.is_meta:
            return "its weight is on meta (offloaded or not loaded)"
        if type(weight.data) is not torch.Tensor or weight.dtype not in _DTYPES:
            return f"its weight is quantized ({weight.dtype}): merge into='lora', or dequantize it"
        if tuple(weight.shape) != self._shape(layer):
            return f"its weight has shape {tuple(weight.shape)}, expected {self._shape(layer)}"
        if other := self._same_memory(model, weight):
            return (
                f"its weight is tied to that of {other}, which would change too: untie them first, or"
                " merge into='lora'"
            )
        return None

    def _shape(self, layer):
        shape = (layer.out_features, layer.in_features)
        return shape[::-1] if _is_transposed(self.base) else shape

    def _same_memory(self, model, weight):
        """The path of another module with a tensor in the same memory."""
        for path, module in model.named_modules():
            if module is self.base:
                continue
            held = [*module._parameters.values(), *module._buffers.values()]
            for tensor in held:
                same = tensor is weight or (tensor is not None and _overlap(tensor, weight))
                if same and not isinstance(module, LoraMoeLinear):
                    return path or "the model itself"
        return None


def _kind(base):
    """The class whose forward the base uses, or None if that is unknown."""
    if "forward" in vars(base) and not hasattr(
        base, "_hf_hook"
    ):  # accelerate's calls the class's forward
        return None
    if type(base).forward is nn.Linear.forward:
        return nn.Linear
    if type(base).__name__ == "Conv1D" and hasattr(base, "nf"):
        return type(base)
    return None


def _is_transposed(base):
    return _kind(base) is not nn.Linear


def _overlap(tensor, weight):
    if type(tensor.data) is not torch.Tensor or tensor.device != weight.device or tensor.is_meta:
        return False
    if not tensor.numel() or tensor.layout != torch.strided:
        return False
    begin, end = _span(tensor)
    first, last = _span(weight)
    return begin < last and first < end


def _span(tensor):
    reach = sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride())) + 1
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()
