"""LoraMoeConfig: every choice of a mixture of LoRA experts, checked before anything is allocated.

A configuration may come from an untrusted file, so each field has an upper bound: what passes here
costs at most MAX_ROWS rows of each linear's width, and no message repeats a value at full length.
"""

from __future__ import annotations

import dataclasses
import re
from itertools import accumulate
from reprlib import repr as brief

from .functional import GATES

MAX_EXPERTS = 4096
MAX_RANK = 1024  # of one expert
MAX_ROWS = 65_536  # of all experts together: 1 GiB of fp32 for a linear of width 4096
MAX_COEFFICIENT = 1e6  # alpha, balance_coef, z_coef
MAX_PATTERN = 4096  # characters of a regular expression


@dataclasses.dataclass(frozen=True)
class LoraMoeConfig:
    """y = W0 x + sum over e in topk(router(x)) of  g_e (alpha / r_e) B_e A_e x, in numbers.

    Args:
        num_experts: E, in [1, 4096].
        r: the rank of every expert, in [1, 1024], or one rank per expert; 65,536 at most together.
        top_k: experts a token, in [1, E]; E is the dense mixture.
        alpha: expert e is scaled by alpha / r_e; in [0, 1e6].
        dropout: on the experts' input while training, never on the router's; in [0, 1).
        gate: "softmax" over all experts, or "sigmoid" of each logit.
        renormalize: divide the picked gates by their sum.  With top_k=1 each weight is then 1, and
            only auxiliary losses train the router.
        shared_a: all experts read one A (HydraLoRA, BranchLoRA); the ranks must be equal.
        selection_bias: keep a buffer (E,) that is added to the gates for the selection only; see
            losses.update_selection_bias (arXiv 2408.15664).
        target_modules: which modules inject() replaces: a tuple of names, each matching a module
            whose path is the name or ends in "." + name (as in PEFT), or one string, a regular
            expression that must match the whole path.
        exclude_modules: modules to leave alone, in the same form; it wins over target_modules.
        balance_coef: weight of the load-balancing loss in aux_loss(); in [0, 1e6].
        z_coef: weight of the router's z-loss in aux_loss(); in [0, 1e6].
    Raises:
        ValueError: a field does not fit; the message names it, what was expected and what was
            received.
    """

    num_experts: int = 8
    r: int | tuple[int, ...] = 8
    top_k: int = 2
    alpha: float = 16.0
    dropout: float = 0.0
    gate: str = "softmax"
    renormalize: bool = True
    shared_a: bool = False
    selection_bias: bool = False
    target_modules: str | tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    balance_coef: float = 0.01
    z_coef: float = 0.001

    def __post_init__(self):
        _integer("num_experts", self.num_experts, MAX_EXPERTS)
        object.__setattr__(self, "r", _ranks(self.r, self.num_experts))
        _integer("top_k", self.top_k, self.num_experts)
        for name in ("alpha", "balance_coef", "z_coef"):
            object.__setattr__(self, name, _coefficient(name, getattr(self, name)))
        object.__setattr__(self, "dropout", _coefficient("dropout", self.dropout))
        _expect(self.dropout < 1, "dropout", "a probability in [0, 1)", self.dropout)
        _expect(self.gate in GATES, "gate", f"one of {GATES}", self.gate)
        for name in ("renormalize", "shared_a", "selection_bias"):
            _expect(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        equal = len(set(self.ranks)) == 1
        _expect(equal or not self.shared_a, "r", "equal ranks with shared_a", self.r)
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _pattern(name, getattr(self, name)))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each expert, (E,)."""
        return (self.r,) * self.num_experts if isinstance(self.r, int) else self.r

    @property
    def rank_offsets(self) -> int | list[int]:
        """As functional.grouped_lora takes them: one rank for all, or E + 1 row offsets."""
        return self.r if isinstance(self.r, int) else [0, *accumulate(self.r)]

    def to_dict(self) -> dict:
        """Plain lists, strings and numbers; from_dict(config.to_dict()) == config."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict) -> LoraMoeConfig:
        """The inverse of to_dict; a field that is left out takes its default.

        Raises:
            ValueError: `fields` is no dict, holds an unknown field, or a value does not fit.
        """
        _expect(isinstance(fields, dict), "config", "a dict of fields", fields)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [name for name in fields if name not in known]
        _expect(not unknown, "config", f"only the fields {sorted(known)}", unknown)
        return cls(**fields)


def _expect(condition, name, expected, received):
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {brief(received)}")


def _integer(name, value, high):
    _expect(type(value) is int and 1 <= value <= high, name, f"an integer in [1, {high}]", value)


def _coefficient(name, value):
    """Compared before it is converted: neither NaN nor an integer beyond floats gets through."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    expected = f"a number in [0, {MAX_COEFFICIENT:g}]"
    _expect(number and 0 <= value <= MAX_COEFFICIENT, name, expected, value)
    return float(value)


def _ranks(r, num_experts):
    if not isinstance(r, (list, tuple)):
        _integer("r", r, MAX_RANK)
        rows = r * num_experts
    else:
        _expect(len(r) == num_experts, "r", f"one rank for each of {num_experts} experts", r)
        for e, rank in enumerate(r):
            _integer(f"r[{e}]", rank, MAX_RANK)
        r, rows = tuple(r), sum(r)
    _expect(rows <= MAX_ROWS, "r", f"at most {MAX_ROWS} rows for all experts together", rows)
    return r


def _pattern(name, value):
    if isinstance(value, (list, tuple)):
        plain = all(isinstance(suffix, str) and suffix for suffix in value)
        _expect(plain, name, "module names", value)
        return tuple(value)
    _expect(isinstance(value, str), name, "module names, or one regular expression", value)
    _expect(len(value) <= MAX_PATTERN, name, f"at most {MAX_PATTERN} characters", value)
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{name}: expected a regular expression, got {brief(value)}: {error}"
        ) from None
    return value
