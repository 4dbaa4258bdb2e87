"""MoeLoraModel: PEFT's tuner that adds mixtures of LoRA experts to a model and removes them."""

from __future__ import annotations

import contextlib
import dataclasses

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..attach import attach, detach
from ..injection import place
from ..targets import is_all_linear, refuse, targets_of
from ..tensors import adapter_dtype
from ..unsupported import unsupported
from .layer import NO_MERGE, MoeLoraLinear


class MoeLoraModel(BaseTuner):
    """A model with the experts of one or more MoeLoraConfig; created by get_peft_model.

    aux_loss, router_stats, use_routing, save_adapter and the other functions of lora_moe apply to the active
    adapter.

    Raises:
        ValueError: if a target is not linear or not supported, with the reason; the model is unchanged.
    """

    prefix = "lora_moe_"
    tuner_layer_cls = MoeLoraLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # --- adding experts --------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, *args, **kwargs) -> None:
        super().inject_adapter(model, *args, **kwargs)
        attach(model, saves=False)

    def _prepare_model(self, peft_config, model):
        """Check the targets before anything is replaced."""
        adapted = {path for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        if is_all_linear(peft_config.target_modules or ()):
            peft_config.target_modules = _all_linear(model, peft_config, adapted)
        found = [
            path
            for path, _ in model.named_modules()
            if path
            and not any(path == a or path.startswith(f"{a}.") for a in adapted)
            and self._check_target_module_exists(peft_config, path)
        ]
        refuse("target_modules: expected linear modules", unsupported(model, found))

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **_
    ):
        layer = target
        if not isinstance(target, MoeLoraLinear):
            layer = MoeLoraLinear(target)
            place(self.model, {target: layer})
        layer.add(adapter_name, peft_config.at(current_key), peft_config.frozen_experts)
        if adapter_name not in self.active_adapters:
            layer.lora_moe_experts[adapter_name].requires_grad_(False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Experts are created in fp32; without autocast they are cast to the base's dtype, as in PEFT.

        adapter_dtype overrides both.
        """
        if autocast_adapter_dtype or self.peft_config[adapter_name].adapter_dtype is not None:
            return
        for experts in _experts_of(self.model, adapter_name):
            config = dataclasses.replace(experts.config, adapter_dtype="base")
            dtype = adapter_dtype(experts.base_layer, config)
            experts.lora_A.data = experts.lora_A.data.to(dtype)
            experts.lora_B.data = experts.lora_B.data.to(dtype)

    # --- removing experts ------------------------------------------------------------------------

    def _check_merge_allowed(self):
        raise ValueError(NO_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args, **kwargs):
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        detach(model)
        return model

    def _replace_module(self, parent, child_name, new_module, child):
        """Replace the module under all of its names."""
        place(self.model, {child: new_module})

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, *args, **kwargs):
        """PEFT saves the configuration after this call, so store the ids of frozen experts."""
        frozen = {experts.frozen for experts in _experts_of(model, adapter_name)}
        if len(frozen) > 1:
            raise ValueError(
                f"frozen: expected the same experts in every layer of {adapter_name!r}, as from"
                f" lora_moe.freeze_experts, got {sorted(frozen)}"
            )
        config.frozen_experts = list(*frozen)
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    # --- calls -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: expected None, as samples of a batch cannot use different mixtures; put the"
                " experts into one mixture and route with lora_moe.use_routing(model, task_ids=)"
            )
        yield


def _experts_of(model, adapter_name):
    """Yield an adapter's experts, layer by layer."""
    for layer in model.modules():
        if isinstance(layer, MoeLoraLinear) and adapter_name in layer.lora_moe_experts:
            yield layer.lora_moe_experts[adapter_name]


def _all_linear(model, peft_config, adapted):
    """Paths of the modules that lora_moe.inject would select, and of those that have an adapter."""
    config = dataclasses.replace(peft_config.at(""), target_modules="all-linear")
    present = {path for path in adapted if isinstance(model.get_submodule(path), MoeLoraLinear)}
    try:
        return present | targets_of(model, config).keys()
    except ValueError:
        if not present:
            raise
        return present
