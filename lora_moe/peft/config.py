"""MoeLoraConfig: LoraMoeConfig with PEFT's field names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import InitVar, dataclass

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from .. import model_card
from ..components import Component, plain
from ..config import FFN, LoraMoeConfig
from ..peft_moe import RENAMED
from .registration import member

# PEFT's LoraConfig(target_parameters=) already adapts a model's own experts; PEFT does not adapt FFNs
_OWN = {field.name for field in dataclasses.fields(LoraMoeConfig)}
_OWN -= {"target_parameters", "placement"}
_MODULES = ("target_modules", "exclude_modules", "modules_to_save")


@dataclass
class MoeLoraConfig(PeftConfig):
    """A mixture of LoRA experts for get_peft_model, add_adapter and `peft_config=`.

        y = W0 x + sum over e in topk(router(x)) of  g_e s_e B_e A_e x,   s_e = alpha_e / r_e

    Args:
        r, lora_alpha: rank and alpha of every expert, or a list with one per expert.
        lora_dropout: on the experts' input in training.
        use_rslora: scale by alpha / sqrt(r).
        target_modules, exclude_modules: names, or a regular expression, as in LoraConfig; "all-linear" is
            as in lora_moe.inject.  None is PEFT's default for LoRA and the model type.
        modules_to_save: modules that are fully trained and saved with the adapter.
        layers_to_transform, layers_pattern: as in LoraConfig.
        rank_pattern, alpha_pattern: {name or regular expression: value in place of r or lora_alpha}, as in
            LoraConfig.
        num_experts, top_k, gate, renormalize, temperature, top_p, threshold, router_bias, selection_bias,
        shared_a, adapter_dtype, balance_coef, z_coef, router, middle: see lora_moe.LoraMoeConfig; router
            and middle are passed as their to_dict().
        frozen_experts: ids of frozen experts (lora_moe.freeze_experts); set on saving.
        mixture: a LoraMoeConfig, or a dict of its fields, instead of the fields above.
        task_type, base_model_name_or_path, revision, inference_mode: as in PEFT.
    Raises:
        ValueError: if a field is invalid, or mixture conflicts with another field.
    """

    r: int | list[int] = 8
    lora_alpha: float | list[float] = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict = dataclasses.field(default_factory=dict)
    alpha_pattern: dict = dataclasses.field(default_factory=dict)
    num_experts: int = 8
    top_k: int | None = None
    gate: str = "softmax"
    renormalize: bool | None = None
    temperature: float = 1.0
    top_p: float | None = None
    threshold: float | None = None
    router_bias: bool = False
    selection_bias: bool = False
    shared_a: bool = False
    adapter_dtype: str | None = None
    balance_coef: float = 0.01
    z_coef: float = 0.001
    router: dict | None = None
    middle: dict | None = None
    frozen_experts: list[int] = dataclasses.field(default_factory=list)
    mixture: InitVar[LoraMoeConfig | dict | None] = None

    def __post_init__(self, mixture):
        super().__post_init__()
        self.peft_type = member()
        if mixture is not None:
            self._take(_mixture_of(mixture))
        own = self.at("")  # raises for invalid fields
        self._expect_patterns()
        for name in self._layer_fields():
            setattr(self, name, plain(getattr(own, RENAMED.get(name, name))))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, set(value))  # as in PEFT's configurations
        if isinstance(self.target_modules, str) and (
            self.layers_to_transform is not None or self.layers_pattern is not None
        ):
            raise ValueError(
                "layers_to_transform: expected None with a regular expression in target_modules,"
                f" got {self.layers_to_transform!r}"
            )

    def _take(self, mixture):
        """Set the fields of a LoraMoeConfig; raises if a field of this class conflicts."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in (*self._layer_fields(), *_MODULES):
            value = getattr(mixture, RENAMED.get(name, name))
            value = value.to_dict() if isinstance(value, Component) else value
            own = getattr(self, name)
            if name in _MODULES and not value:
                continue
            if own not in (defaults[name], value):
                raise ValueError(f"{name}: expected mixture's {value!r} or no value, got {own!r}")
            setattr(self, name, plain(value))

    def _expect_patterns(self):
        for name, field in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            patterns = getattr(self, name) or {}
            if not isinstance(patterns, Mapping):
                raise ValueError(f"{name}: expected a dict, got {type(patterns).__name__}")
            for pattern, value in patterns.items():
                try:
                    self._config(**{RENAMED.get(field, field): value})
                    re.compile(pattern)
                except (ValueError, re.error) as error:
                    said = str(error).removeprefix(field).removeprefix(": ")
                    raise ValueError(f"{name}[{pattern!r}]: {said}") from None

    @classmethod
    def _layer_fields(cls):
        """Fields of a layer that do not depend on the adapted module."""
        names = (field.name for field in dataclasses.fields(cls))
        return [n for n in names if RENAMED.get(n, n) in _OWN and n not in _MODULES]

    def at(self, path: str) -> LoraMoeConfig:
        """The configuration of the experts of the module at this path."""
        fields = {}
        for name, patterns in (("r", self.rank_pattern), ("alpha", self.alpha_pattern)):
            pattern = get_pattern_key(patterns or {}, path)
            if pattern in (patterns or {}):
                fields[name] = patterns[pattern]
        return self._config(**fields)

    def _config(self, **special):
        fields = {RENAMED.get(name, name): getattr(self, name) for name in self._layer_fields()}
        fields |= special
        fields["target_modules"] = self.target_modules or ()
        fields["exclude_modules"] = self.exclude_modules or ()
        try:
            return LoraMoeConfig(**fields)
        except ValueError as error:
            raise ValueError(_in_our_names(str(error))) from None

    def to_dict(self) -> dict:
        """The fields with sets as sorted lists."""
        fields = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write adapter_config.json, and add the required import to README.md."""
        super().save_pretrained(save_directory, **kwargs)
        model_card.add_loading_with_peft(save_directory)


def _mixture_of(mixture) -> LoraMoeConfig:
    if isinstance(mixture, Mapping):
        mixture = LoraMoeConfig.from_dict(dict(mixture))
    if not isinstance(mixture, LoraMoeConfig):
        raise ValueError(
            f"mixture: expected a LoraMoeConfig or a dict of its fields, got {type(mixture).__name__}"
        )
    if mixture.target_parameters:
        raise ValueError(
            "mixture: expected experts on linear modules, got target_parameters, which only lora_moe.inject"
            " supports; in PEFT use LoraConfig(target_parameters=), which loads files from lora_moe.to_peft"
        )
    if mixture.placement == FFN:
        raise ValueError(
            "mixture: expected placement='linear', got placement='ffn', which only lora_moe.inject supports"
        )
    return mixture


def _in_our_names(message):
    for name, own in RENAMED.items():
        if message.startswith(own):
            return name + message.removeprefix(own)
    return message
