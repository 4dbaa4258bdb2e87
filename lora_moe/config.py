"""LoraMoeConfig: every choice of a mixture of LoRA experts, checked before anything is allocated.

A configuration may come from an untrusted file, so each field has an upper bound: what passes here
costs at most MAX_ROWS rows of each linear's width, and no message repeats a value at full length.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Collection
from itertools import accumulate
from reprlib import repr as brief

import torch

from .components import plain
from .middle import Middle
from .reference import GATES
from .routers import Router, TokenRouter
from .routers.base import TOKEN_FIELDS

MAX_EXPERTS = 4096
MAX_RANK = 1024  # of one expert
MAX_ROWS = 65_536  # of all experts together: 1 GiB of fp32 for a linear of width 4096
MAX_COEFFICIENT = 1e6  # alpha, balance_coef, z_coef
MAX_PATTERN = 4096  # characters of a regular expression
FFN = "ffn"
PLACEMENTS = ("linear", FFN)
ADAPTER_DTYPES = ("base", "float32", "bfloat16", "float16", "float64")
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

    The router's logits are (W x + bias) / temperature; gate and top-k follow.

    Args:
        num_experts: E, in [1, 4096].  None means 8, or as many as the model's own with target_parameters.
        r: the rank of every expert, in [1, 1024], or one rank per expert; 65,536 at most together.
        top_k: experts per token, in [1, E]; E is the dense mixture.  None means 2, or 1 if E is 1.
        alpha: a number in [0, 1e6], or one per expert: expert e is scaled by alpha_e / r_e.
        use_rslora: scale by alpha_e / sqrt(r_e) instead (rsLoRA, arXiv 2312.03732).
        dropout: on the experts' input while training, never on the router's; in [0, 1).
        gate: "softmax" over all experts, or "sigmoid" of each logit.
        renormalize: divide the picked gates by their sum.  None means top_k > 1: with top_k=1 each weight
            would be 1, and the task's loss would not train the router.
        temperature: divides the logits; positive, at most 1e6.
        top_p: in (0, 1]: a token takes its picked experts, best first, until their gates sum to top_p.
            Softmax only.  None takes all top_k.
        threshold: in [0, 1]: picked experts with a smaller gate are dropped.  None keeps them.
        router_bias: give the router a trainable bias (E,), zero at first.
        selection_bias: keep a buffer (E,) that is added to the gates for the selection only; see
            losses.update_selection_bias (arXiv 2408.15664).
        shared_a: all experts read one A (HydraLoRA, BranchLoRA); the ranks must be equal.
        adapter_dtype: of lora_A and lora_B: None is float32 (float64 for a float64 base), as in PEFT;
            "base" is the dtype of the base's weight; or a torch.dtype or its name.  The router is
            float32 (float64) in each case.
        target_modules: which modules inject() replaces: names, each matching a module whose path is
            the name or ends in "." + name (as in PEFT), in a tuple, list or set; or one string, a
            regular expression that must match the whole path; or "all-linear".
        exclude_modules: modules to leave alone, as names or a regular expression; it wins over
            target_modules.
        modules_to_save: names of modules that are trained as a whole and saved with the adapter, such
            as a classification head.
        balance_coef: weight of the load-balancing loss in aux_loss(); in [0, 1e6].
        z_coef: weight of the router's z-loss in aux_loss(); in [0, 1e6].
        router: who decides in place of the token router that the fields above describe, such as
            TaskRouter(num_tasks=3); see docs/routers.md.
        middle: what stands between lora_A and lora_B in place of the gate; None is the gate.
        target_parameters: the fused weights (E, D_out, D_in) of the model's own experts that take a LoRA per
            expert, as in PEFT: names, each matching a parameter whose path is the name or ends in "." +
            name, such as ("mlp.experts.gate_up_proj", "mlp.experts.down_proj").  The model's own router
            decides, so that no field about a router, top_k or their losses may be set beside it; see
            docs/experts.md.
        placement: what target_modules are placed as: "linear", each by itself, or "ffn": those of one FFN as
            one LoraMoeMLP, whose router decides once for all of them; those of no FFN as a plain LoRA, which
            is one expert of the same rank.
    Raises:
        ValueError: a field does not fit; the message names it, what was expected and what was
            received.
        TypeError: there is no such field; the message suggests one.
    """

    num_experts: int = None  # type: ignore[assignment]  # until __post_init__, or the model, says
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
            raise TypeError(f"LoraMoeConfig: there is no field {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self):
        names = _names("target_parameters", self.target_parameters or ())
        self._set("target_parameters", names)
        if not names or self.num_experts is not None:
            E = 8 if self.num_experts is None else self.num_experts
            self._set("num_experts", _integer("num_experts", E, MAX_EXPERTS))
        if names:
            self._leave_the_router_to_the_model()
        else:
            top_k = min(2, self.num_experts) if self.top_k is None else self.top_k
            self._set("top_k", _integer("top_k", top_k, self.num_experts))
        E = self.num_experts or 1
        self._set("r", _ranks(self.r, E))
        self._set("alpha", _alphas(self.alpha, E))
        for name in ("dropout", "balance_coef", "z_coef", "temperature"):
            self._set(name, _coefficient(name, getattr(self, name)))
        expect(self.dropout < 1, "dropout", "a probability in [0, 1)", self.dropout)
        expect(self.temperature > 0, "temperature", "a positive number", self.temperature)
        expect(self.gate in GATES, "gate", f"one of {GATES}", self.gate)
        for name in ("shared_a", "selection_bias", "router_bias", "use_rslora"):
            expect(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        fits = self.renormalize is None or isinstance(self.renormalize, bool)
        expect(fits, "renormalize", "a bool or None", self.renormalize)
        self._set("top_p", _share("top_p", self.top_p, zero=False))
        self._set("threshold", _share("threshold", self.threshold))
        softmax = self.gate == "softmax"
        expect(softmax or self.top_p is None, "gate", "'softmax' with top_p", self.gate)
        equal = isinstance(self.r, int) or len(set(self.r)) == 1
        expect(equal or not self.shared_a, "r", "equal ranks with shared_a", self.r)
        self._set("adapter_dtype", _dtype_name(self.adapter_dtype))
        for name in ("target_modules", "exclude_modules"):
            self._set(name, _pattern(name, getattr(self, name)))
        self._set("modules_to_save", _names("modules_to_save", self.modules_to_save or ()))
        self._set("router", _component("router", self.router, Router))
        self._set("middle", _component("middle", self.middle, Middle))
        if self.router == TokenRouter():
            self._set("router", None)
        self._expect_parts_that_fit()
        expect(self.placement in PLACEMENTS, "placement", f"one of {PLACEMENTS}", self.placement)
        expected = (
            "None with placement='ffn', whose experts have the FFN's nonlinearity between them"
        )
        expect(self.placement != FFN or self.middle is None, "middle", expected, self.middle)

    def _leave_the_router_to_the_model(self):
        """Beside target_parameters nothing may be asked of a router or of its losses."""
        own = {"top_k": None, "shared_a": False, "router": None, "middle": None}
        own |= TOKEN_FIELDS | {"placement": "linear"}
        for name, default in own.items():
            expected = f"{default!r} with target_parameters, whose experts the model's router picks"
            expect(getattr(self, name) == default, name, expected, getattr(self, name))
        for name, default in (("balance_coef", 0.01), ("z_coef", 0.001)):
            expected = "0 with target_parameters, as the model has a loss for its own router"
            expect(getattr(self, name) in (0, default), name, expected, getattr(self, name))
            self._set(name, 0.0)
        named = self.target_modules or ()
        expected = "none beside target_parameters (pass inject a list of two configurations)"
        expect(len(named) == 0, "target_modules", expected, named)
        if self.num_experts is None:
            for name in ("r", "alpha"):
                value = getattr(self, name)
                expected = f"the model's number of experts beside one {name} for each"
                expect(not _is_sequence(value), "num_experts", expected, None)

    def _expect_parts_that_fit(self):
        if self.router is not None:
            for name in TOKEN_FIELDS.keys() - set(self.router.fields_read()):
                default, value = TOKEN_FIELDS[name], getattr(self, name)
                expected = f"{default!r}, as {type(self.router).__name__} does not read it"
                expect(value == default, name, expected, value)
        counts = [p.task_count for p in (self.router, self.middle) if p is not None]
        counts = {n for n in counts if n is not None}
        expect(len(counts) < 2, "num_tasks", "one number in router and middle", counts)

    @property
    def num_tasks(self) -> int | None:
        """How many tasks the router or the middle tells apart, None if they read none."""
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
        """As functional.grouped_lora takes them: one rank for all, or E + 1 row offsets."""
        return self.r if isinstance(self.r, int) else [0, *accumulate(self.r)]

    @property
    def normalizes(self) -> bool:
        """Whether the picked gates are divided by their sum; resolves renormalize=None."""
        return (self.top_k or 0) > 1 if self.renormalize is None else self.renormalize

    @property
    def has_aux_loss(self) -> bool:
        return self.balance_coef > 0 or self.z_coef > 0

    def plain_lora(self) -> LoraMoeConfig:
        """One expert of the same rank and scale whose gate is 1: a LoRA.

        Raises:
            ValueError: the experts differ in rank or scale.
        """
        same = len(set(self.ranks)) == 1 and len(set(self.scales)) == 1
        expected = "the same for all experts, as linear maps of no FFN get a LoRA like one of them"
        expect(same, "r, alpha", expected, (self.r, self.alpha))
        alpha = self.alpha[0] if isinstance(self.alpha, tuple) else self.alpha
        return self.one_expert(self.ranks[0], alpha, self.use_rslora)

    def one_expert(self, r: int, alpha: float, use_rslora: bool = False) -> LoraMoeConfig:
        """A LoRA of this rank and alpha at the same places; its router always says 1."""
        left = {name: getattr(self, name) for name in _OF_A_LORA}
        return LoraMoeConfig(
            num_experts=1, top_k=1, r=r, alpha=alpha, use_rslora=use_rslora, renormalize=True,
            balance_coef=0.0, z_coef=0.0, **left,
        )  # fmt: skip

    def to_dict(self) -> dict:
        """Plain lists, strings and numbers; from_dict(config.to_dict()) == config."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: plain(value) for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict) -> LoraMoeConfig:
        """The inverse of to_dict; a field that is left out takes its default.

        Raises:
            ValueError: `fields` is no dict, holds an unknown field, or a value does not fit.
        """
        expect(isinstance(fields, dict), "config", "a dict of fields", fields)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [name for name in fields if name not in known]
        expect(not unknown, "config", f"only the fields {sorted(known)}", unknown)
        return cls(**fields)


def _component(name, value, family):
    """A router or middle; a dict of one is read."""
    if isinstance(value, dict):
        value = family.from_dict(value)
    fits = value is None or (isinstance(value, family) and type(value) in family.known.values())
    expect(fits, name, f"None or a registered {family.__name__}", value)
    return value


def expect(condition, name: str, expected: str, received) -> None:
    """Raises ValueError unless the condition holds; no message repeats a value at full length."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {brief(received)}")


def _integer(name, value, high):
    """NumPy's integers count, bool does not."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    expect(whole and 1 <= value <= high, name, f"an integer in [1, {high}]", value)
    return int(value)


def _coefficient(name, value):
    """Compared before it is converted: neither NaN nor an integer beyond floats gets through."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    expected = f"a number in [0, {MAX_COEFFICIENT:g}]"
    expect(number and 0 <= value <= MAX_COEFFICIENT, name, expected, value)
    return float(value)


def _share(name, value, zero=True):
    if value is None:
        return None
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    fits = number and 0 <= value <= 1 and (zero or value > 0)
    expect(fits, name, f"None or a number in {'[' if zero else '('}0, 1]", value)
    return float(value)


def _is_sequence(value):
    """Lists, tuples, and NumPy arrays or tensors of one dimension."""
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) == 1


def _listed(values):
    return values.tolist() if hasattr(values, "tolist") else values


def _alphas(alpha, num_experts):
    if not _is_sequence(alpha):
        return _coefficient("alpha", alpha)
    expect(len(alpha) == num_experts, "alpha", f"a number or {num_experts}, one per expert", alpha)
    return tuple(_coefficient(f"alpha[{e}]", a) for e, a in enumerate(_listed(alpha)))


def _ranks(r, num_experts):
    if not _is_sequence(r):
        r = _integer("r", r, MAX_RANK)
        rows = r * num_experts
    else:
        expect(len(r) == num_experts, "r", f"one rank for each of {num_experts} experts", r)
        r = tuple(_integer(f"r[{e}]", rank, MAX_RANK) for e, rank in enumerate(_listed(r)))
        rows = sum(r)
    expect(rows <= MAX_ROWS, "r", f"at most {MAX_ROWS} rows for all experts together", rows)
    return r


def _dtype_name(dtype):
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    fits = name is None or (isinstance(name, str) and name in ADAPTER_DTYPES)
    expect(fits, "adapter_dtype", f"None or one of {ADAPTER_DTYPES}", dtype)
    return name


def _names(name, value):
    """Any collection of names as a tuple, a set in alphabetical order."""
    hint = f"; for one name write ({value!r},)" if isinstance(value, str) else ""
    plain = isinstance(value, Collection) and not isinstance(value, (str, bytes, dict))
    plain = plain and all(isinstance(suffix, str) and suffix for suffix in value)
    expect(plain, name, f"module names{hint}", value)
    ordered = sorted(value) if isinstance(value, (set, frozenset)) else value
    return tuple(map(str, ordered))


def _pattern(name, value):
    """Not compiled here: a regular expression from a file may cost seconds to compile."""
    if value is None:
        return ()
    if not isinstance(value, str):
        return _names(name, value)
    expect(len(value) <= MAX_PATTERN, name, f"at most {MAX_PATTERN} characters", value)
    return value
