"""LoraMoeConfig: all options of a mixture of LoRA experts, validated before anything is allocated.

A configuration may come from an untrusted file, so every field has an upper bound: a valid one allocates
at most MAX_ROWS rows per linear layer, and error messages abbreviate values.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import accumulate

import torch

from . import fields as checked
from .components import plain
from .fields import expect
from .middle import Middle
from .reference import GATES
from .routers import Router, TokenRouter
from .routers.base import TOKEN_FIELDS

MAX_EXPERTS = 4096
FFN = "ffn"
PLACEMENTS = ("linear", FFN)
_OF_A_LORA = ("dropout", "adapter_dtype", "target_modules", "exclude_modules", "modules_to_save")
_PEFT_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "rank": "r",
    "rslora": "use_rslora",
    "num_experts_per_tok": "top_k",
    "layers_to_transform": "target_modules with a regular expression",
    "rank_pattern": "r, one rank per expert, and one inject call for each group of modules",
}


@dataclasses.dataclass(frozen=True)
class LoraMoeConfig:
    """y = W0 x + sum over e in topk(router(x)) of  g_e s_e B_e A_e x,   s_e = alpha_e / r_e.

    The router's logits are (W x + bias) / temperature, followed by gate and top-k.

    Args:
        num_experts: E, in [1, 4096].  None means 8, or with target_parameters the model's number.
        r: the rank of every expert, in [1, 1024], or one rank per expert; the sum is at most 65,536.
        top_k: experts per token, in [1, E]; E gives the dense mixture.  None means 2, or 1 if E is 1.
        alpha: a number in [0, 1e6], or one per expert: expert e is scaled by alpha_e / r_e.
        use_rslora: scale by alpha_e / sqrt(r_e) instead (rsLoRA, arXiv 2312.03732).
        dropout: on the experts' input in training, not on the router's; in [0, 1).
        gate: "softmax" over all experts, or "sigmoid" of each logit.
        renormalize: divide the picked gates by their sum.  None means top_k > 1: with top_k=1 every weight
            would be 1, and the task loss would not train the router.
        temperature: divides the logits; positive, at most 1e6.
        top_p: in (0, 1]: a token keeps its picked experts, best first, until their gates sum to top_p.
            Softmax only.  None keeps all top_k.
        threshold: in [0, 1]: picked experts with a smaller gate are dropped.  None drops none.
        router_bias: add a trainable bias (E,) to the router, initialized to zero.
        selection_bias: register a buffer (E,) that is added to the gates for the selection only; see
            losses.update_selection_bias (arXiv 2408.15664).
        shared_a: all experts share one A (HydraLoRA, BranchLoRA); the ranks must be equal.
        adapter_dtype: dtype of lora_A and lora_B: None is float32 (float64 for a float64 base), as in PEFT;
            "base" is the dtype of the base's weight; or a torch.dtype or its name.  The router is always
            float32 (float64).
        target_modules: the modules that inject() replaces.  A tuple, list or set of names, each matching
            the modules whose path is the name or ends in "." + name, as in PEFT; or one string, a
            regular expression that must match the whole path; or "all-linear".
        exclude_modules: modules to skip, as names or a regular expression; overrides target_modules.
        modules_to_save: names of modules that are fully trained and saved with the adapter, such as a
            classification head.
        balance_coef: weight of the load-balancing loss in aux_loss(); in [0, 1e6].
        z_coef: weight of the router's z-loss in aux_loss(); in [0, 1e6].
        router: replaces the token router that the fields above describe, for example
            TaskRouter(num_tasks=3); see docs/routers.md.
        middle: what replaces the gate between lora_A and lora_B; None is the gate.
        target_parameters: the fused weights (E, D_out, D_in) of the model's own experts that get a LoRA per
            expert, as in PEFT: names, each matching the parameters whose path is the name or ends in "." +
            name, such as ("mlp.experts.gate_up_proj", "mlp.experts.down_proj").  The model's own router
            picks the experts, so top_k and the fields of the router and its losses cannot be set; see
            docs/experts.md.
        placement: "linear" adapts each target module separately.  "ffn" turns those of one FFN into one
            LoraMoeMLP with a single routing decision; target modules outside of FFNs get a plain LoRA,
            that is one expert of the same rank.
    Raises:
        ValueError: if a field is invalid; the message names the field, what was expected and its value.
        TypeError: if there is no such field; the message suggests one.
    """

    num_experts: int = None  # type: ignore[assignment]  # set in __post_init__ or from the model
    r: int | tuple[int, ...] = 8
    top_k: int = None  # type: ignore[assignment]  # likewise
    alpha: float | tuple[float, ...] = 16.0
    dropout: float = 0.0
    gate: str = "softmax"
    renormalize: bool | None = None
    shared_a: bool = False
    selection_bias: bool = False
    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    balance_coef: float = 0.01
    z_coef: float = 0.001
    use_rslora: bool = False
    temperature: float = 1.0
    top_p: float | None = None
    threshold: float | None = None
    router_bias: bool = False
    adapter_dtype: str | torch.dtype | None = None
    modules_to_save: tuple[str, ...] = ()
    router: Router | None = None
    middle: Middle | None = None
    target_parameters: tuple[str, ...] = ()
    placement: str = "linear"

    def __new__(cls, *args, **fields):
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields.keys() - known:
            hint = _PEFT_NAMES.get(name)
            hint = f"; here it is {hint}" if hint else f"; expected one of {sorted(known)}"
            raise TypeError(f"LoraMoeConfig: unknown field {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self):
        names = checked.names("target_parameters", self.target_parameters or ())
        self._set("target_parameters", names)
        if not names or self.num_experts is not None:
            E = 8 if self.num_experts is None else self.num_experts
            self._set("num_experts", checked.integer("num_experts", E, MAX_EXPERTS))
        if names:
            self._leave_the_router_to_the_model()
        else:
            top_k = min(2, self.num_experts) if self.top_k is None else self.top_k
            self._set("top_k", checked.integer("top_k", top_k, self.num_experts))
        E = self.num_experts or 1
        self._set("r", checked.ranks(self.r, E))
        self._set("alpha", checked.alphas(self.alpha, E))
        for name in ("dropout", "balance_coef", "z_coef", "temperature"):
            self._set(name, checked.coefficient(name, getattr(self, name)))
        expect(self.dropout < 1, "dropout", "a probability in [0, 1)", self.dropout)
        expect(self.temperature > 0, "temperature", "a positive number", self.temperature)
        expect(self.gate in GATES, "gate", f"one of {GATES}", self.gate)
        for name in ("shared_a", "selection_bias", "router_bias", "use_rslora"):
            expect(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        fits = self.renormalize is None or isinstance(self.renormalize, bool)
        expect(fits, "renormalize", "a bool or None", self.renormalize)
        self._set("top_p", checked.share("top_p", self.top_p, zero=False))
        self._set("threshold", checked.share("threshold", self.threshold))
        softmax = self.gate == "softmax"
        expect(softmax or self.top_p is None, "gate", "'softmax' with top_p", self.gate)
        equal = isinstance(self.r, int) or len(set(self.r)) == 1
        expect(equal or not self.shared_a, "r", "equal ranks with shared_a", self.r)
        self._set("adapter_dtype", checked.dtype_name(self.adapter_dtype))
        for name in ("target_modules", "exclude_modules"):
            self._set(name, checked.pattern(name, getattr(self, name)))
        self._set("modules_to_save", checked.names("modules_to_save", self.modules_to_save or ()))
        self._set("router", checked.component("router", self.router, Router))
        self._set("middle", checked.component("middle", self.middle, Middle))
        if self.router == TokenRouter():
            self._set("router", None)
        self._expect_components_that_fit()
        expect(self.placement in PLACEMENTS, "placement", f"one of {PLACEMENTS}", self.placement)
        expected = "None with placement='ffn', whose experts contain the FFN's nonlinearity"
        expect(self.placement != FFN or self.middle is None, "middle", expected, self.middle)

    def _leave_the_router_to_the_model(self):
        """With target_parameters, no field of the router or its losses may be set."""
        own = {"top_k": None, "shared_a": False, "router": None, "middle": None}
        own |= TOKEN_FIELDS | {"placement": "linear"}
        for name, default in own.items():
            expected = (
                f"{default!r} with target_parameters, as the model's own router picks the experts"
            )
            expect(getattr(self, name) == default, name, expected, getattr(self, name))
        for name, default in (("balance_coef", 0.01), ("z_coef", 0.001)):
            expected = "0 with target_parameters, as the model has its own router loss"
            expect(getattr(self, name) in (0, default), name, expected, getattr(self, name))
            self._set(name, 0.0)
        named = self.target_modules or ()
        expected = "() with target_parameters (pass a list of two configurations to inject)"
        expect(len(named) == 0, "target_modules", expected, named)
        if self.num_experts is None:
            for name in ("r", "alpha"):
                value = getattr(self, name)
                expected = f"the model's number of experts, as there is one {name} per expert"
                expect(not checked.is_sequence(value), "num_experts", expected, None)

    def _expect_components_that_fit(self):
        if self.router is not None:
            for name in TOKEN_FIELDS.keys() - set(self.router.fields_read()):
                default, value = TOKEN_FIELDS[name], getattr(self, name)
                expected = f"{default!r}, as {type(self.router).__name__} does not read it"
                expect(value == default, name, expected, value)
        counts = [p.task_count for p in (self.router, self.middle) if p is not None]
        counts = {n for n in counts if n is not None}
        expect(len(counts) < 2, "num_tasks", "the same number in router and middle", counts)

    @property
    def num_tasks(self) -> int | None:
        """Number of tasks of the router or the middle, or None if neither reads task ids."""
        for component in (self.router, self.middle):
            if component is not None and component.task_count is not None:
                return component.task_count
        return None

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each expert, (E,)."""
        return (self.r,) * self.num_experts if isinstance(self.r, int) else self.r

    @property
    def scales(self) -> tuple[float, ...]:
        """s of each expert, (E,): alpha / r, or alpha / sqrt(r) with use_rslora."""
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * self.num_experts
        roots = [math.sqrt(r) if self.use_rslora else r for r in self.ranks]
        return tuple(alpha / root for alpha, root in zip(alphas, roots, strict=True))

    @property
    def rank_offsets(self) -> int | list[int]:
        """The argument of functional.grouped_lora: one common rank, or E + 1 row offsets."""
        return self.r if isinstance(self.r, int) else [0, *accumulate(self.r)]

    @property
    def normalizes(self) -> bool:
        """Whether the picked gates are divided by their sum; resolves renormalize=None."""
        return (self.top_k or 0) > 1 if self.renormalize is None else self.renormalize

    @property
    def has_aux_loss(self) -> bool:
        return self.balance_coef > 0 or self.z_coef > 0

    def plain_lora(self) -> LoraMoeConfig:
        """A plain LoRA: one expert of the same rank and scale, with gate 1.

        Raises:
            ValueError: if the experts differ in rank or scale.
        """
        same = len(set(self.ranks)) == 1 and len(set(self.scales)) == 1
        expected = "the same for all experts, as target modules outside of FFNs get a plain LoRA"
        expect(same, "r, alpha", expected, (self.r, self.alpha))
        alpha = self.alpha[0] if isinstance(self.alpha, tuple) else self.alpha
        return self.one_expert(self.ranks[0], alpha, self.use_rslora)

    def one_expert(self, r: int, alpha: float, use_rslora: bool = False) -> LoraMoeConfig:
        """A LoRA of this rank and alpha on the same modules, with gate 1."""
        left = {name: getattr(self, name) for name in _OF_A_LORA}
        return LoraMoeConfig(
            num_experts=1, top_k=1, r=r, alpha=alpha, use_rslora=use_rslora, renormalize=True,
            balance_coef=0.0, z_coef=0.0, **left,
        )  # fmt: skip

    def to_dict(self) -> dict:
        """The fields as plain lists, strings and numbers; from_dict(config.to_dict()) == config."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: plain(value) for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict) -> LoraMoeConfig:
        """The inverse of to_dict; a field that is left out takes its default.

        Raises:
            ValueError: if `fields` is not a dict, or a field is unknown or invalid.
        """
        return cls(**checked.fields_of(cls, "config", fields))
