"""MoeLoraConfig: LoraMoeConfig under the field names that PEFT's users know."""

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

# a model's own experts are PEFT's own LoRA's: LoraConfig(target_parameters=); PEFT adapts no whole FFN
_OWN = {field.name for field in dataclasses.fields(LoraMoeConfig)}
_OWN -= {"target_parameters", "placement"}
_MODULES = ("target_modules", "exclude_modules", "modules_to_save")


@dataclass
class MoeLoraConfig(PeftConfig):
    """A mixture of LoRA experts for get_peft_model, add_adapter and `peft_config=`.

        y = W0 x + sum over e in topk(router(x)) of  g_e s_e B_e A_e x,   s_e = alpha_e / r_e

    Args:
        r, lora_alpha: rank and alpha of every expert, or a list with one per expert.
        lora_dropout: on the experts' input while training.
        use_rslora: scale by alpha / sqrt(r).
        target_modules, exclude_modules: names, or a regular expression, as in LoraConfig; "all-linear"
            takes what lora_moe.inject takes.  None is PEFT's choice for LoRA and the model's type.
        modules_to_save: modules that are trained as a whole and saved with the adapter.
        layers_to_transform, layers_pattern: as in LoraConfig.
        rank_pattern, alpha_pattern: {name or regular expression: value in place of r or lora_alpha}, as in
            LoraConfig.
        num_experts, top_k, gate, renormalize, temperature, top_p, threshold, router_bias, selection_bias,
        shared_a, adapter_dtype, balance_coef, z_coef, router, middle: see lora_moe.LoraMoeConfig; a router
            or a middle as the dict that its to_dict() makes.
        frozen_experts: experts that do not train (lora_moe.freeze_experts); filled in on saving.
        mixture: a LoraMoeConfig, or a dict of its fields, in place of the fields above.
        task_type, base_model_name_or_path, revision, inference_mode: as in PEFT.
    Raises:
        ValueError: a field does not fit, or mixture and a field of this class say different things.
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
        own = self.at("")  # raises for what does not fit
        self._expect_patterns()
        for name in self._layer_fields():
            setattr(self, name, plain(getattr(own, RENAMED.get(name, name))))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, set(value))  # as PEFT's own
        if isinstance(self.target_modules, str) and (
            self.layers_to_transform is not None or self.layers_pattern is not None
        ):
            raise ValueError(
                "layers_to_transform: expected None with a regular expression in target_modules,"
                f" got {self.layers_to_transform!r}"
            )

    def _take(self, mixture):
        """Fields of a LoraMoeConfig, unless a field of this class says otherwise."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in (*self._layer_fields(), *_MODULES):
            value = getattr(mixture, RENAMED.get(name, name))
            value = value.to_dict() if isinstance(value, Component) else value
            own = getattr(self, name)
            if name in _MODULES and not value:
                continue
            if own not in (defaults[name], value):
                raise ValueError(f"{name}: expected mixture's {value!r} or nothing, got {own!r}")
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
        """Fields that decide what a layer is, whichever module it adapts."""
        names = (field.name for field in dataclasses.fields(cls))
        return [n for n in names if RENAMED.get(n, n) in _OWN and n not in _MODULES]

    def at(self, path: str) -> LoraMoeConfig:
        """What the experts around the module at this path are."""
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
        """Plain lists, in an order that does not change."""
        fields = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """PEFT's adapter_config.json, and in README.md what to import."""
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
            "mixture: expected one around linear modules, got target_parameters, for lora_moe.inject alone;"
            " lora_moe.to_peft writes what PEFT's LoraConfig(target_parameters=) loads"
        )
    if mixture.placement == FFN:
        raise ValueError(
            "mixture: expected one around linear modules, got placement='ffn', for lora_moe.inject alone"
        )
    return mixture


def _in_our_names(message):
    for name, own in RENAMED.items():
        if message.startswith(own):
            return name + message.removeprefix(own)
    return message
