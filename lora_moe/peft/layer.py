"""MoeLoraLinear: PEFT's tuner layer, a linear module with the experts of one or more named adapters.

base_layer                            the module itself
lora_moe_experts.<adapter>.lora_A     and an adapter's other tensors, all with the prefix "lora_moe_"

Several active adapters add up, as in LoRA.
"""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import LoraMoeConfig
from ..layers import LoraMoeLinear
from ..linear import linear_features
from ..tensors import device_of

NO_MERGE = (
    "merge: a mixture of LoRA experts picks experts per token, so it is not a single weight and cannot be"
    " merged; keep the adapter, or call unload() to drop it, or save an expert with lora_moe.to_peft as a"
    " LoRA that can be merged"
)


class MoeExperts(LoraMoeLinear):
    """One adapter's experts and router: a LoraMoeLinear whose base belongs to the enclosing layer."""

    def __init__(self, base: nn.Module, config: LoraMoeConfig, adapter_name: str):
        super().__init__(base, config)
        del self._modules["base_layer"]
        # in a tuple it is not a submodule, and does not appear twice in a state dict
        self._base = (base,)
        self.adapter_name = adapter_name

    @property
    def base_layer(self) -> nn.Module:
        return self._base[0]

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y plus the experts.  (..., D_in), (..., D_out) -> (..., D_out)"""
        return self.adapt(x, y)

    def _load_from_state_dict(self, *args):
        nn.Module._load_from_state_dict(self, *args)  # this module has no base_layer


class MoeLoraLinear(nn.Module, BaseTunerLayer):
    """PEFT's view of a linear module with experts; see lora_moe.LoraMoeLinear for the formula."""

    adapter_layer_names = ("lora_moe_experts",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_features(base_layer)
        self.lora_moe_experts = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []

    def add(self, adapter_name: str, config: LoraMoeConfig, frozen: list[int]) -> None:
        """Add an adapter's experts to this module; PEFT decides whether they are active."""
        experts = MoeExperts(self.base_layer, config, adapter_name)
        experts.frozen = frozen
        self.lora_moe_experts[adapter_name] = experts
        self._mark()

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.lora_moe_experts:
                y = self.lora_moe_experts[name](x, y)
        return y

    # --- what PEFT calls -------------------------------------------------------------------------

    def set_adapter(self, adapter_names, *args, **kwargs) -> None:
        super().set_adapter(adapter_names, *args, **kwargs)
        self._mark()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._mark()

    def merge(self, *args, **kwargs) -> None:
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        raise ValueError("unmerge: expected a merged adapter, but a mixture cannot be merged")

    def _mark(self):
        for name, experts in self.lora_moe_experts.items():
            experts.active = name in self.active_adapters
            experts.enabled = not self.disable_adapters

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None):
        """Moves only the device: the configuration determines the experts' dtype."""
        if adapter_name not in self.lora_moe_experts:
            return
        experts = self.lora_moe_experts[adapter_name]
        if not any(p.is_meta for p in experts.parameters()):
            experts.to(device_of(self.base_layer) if device is None else device)
