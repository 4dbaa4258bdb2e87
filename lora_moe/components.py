"""What a configuration plugs into a layer: a router, a middle; their names in files, tensors and inputs.

Both are frozen dataclasses without tensors of their own.  They say which tensors they need, the layer
registers these, and a forward hands them back.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from reprlib import repr as brief
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import nn

from .context import Decision, fit_rows, sample_rows
from .fields import expect
from .routing_cache import cache_in_use
from .tokens import Tokens

if TYPE_CHECKING:
    from .config import LoraMoeConfig
    from .layers import LoraMoeLinear
    from .routing import Routing

ROUTER_STD = 0.02
MAX_DEPTH = 4  # of components inside components
MAX_TASKS = 65_536
IGNORED = -100  # the label of a token that no loss asks for
normal = functools.partial(nn.init.normal_, std=ROUTER_STD)


class TensorSpec(NamedTuple):
    """One tensor that a component asks the layer for.

    shape   of any number of dimensions
    init    fills it in place
    trains  a parameter; False makes it a buffer
    """

    shape: tuple[int, ...]
    init: Callable[[torch.Tensor], object] = normal
    trains: bool = True


class Batch(NamedTuple):
    """What a forward of a layer knows besides its input.

    samples: the routing with one row per sample, where all tokens of a sample share it; for middles.
    """

    layer: LoraMoeLinear
    decision: Decision
    samples: Routing | None = None

    @property
    def config(self) -> LoraMoeConfig:
        return self.layer.config

    @property
    def training(self) -> bool:
        return self.layer.training

    @property
    def cached(self) -> bool:
        """Tokens before these stand in a cache."""
        return cache_in_use() is not None

    @property
    def one_task(self) -> int | None:
        """The task of all tokens, where the caller said one number."""
        told = self.decision.tasks
        return told if isinstance(told, int) else None

    def tasks(self, x: torch.Tensor) -> torch.Tensor:
        """(T,) int64: the task of each token of x (..., D), -1 for none.

        Raises:
            RuntimeError: nobody said them.
            ValueError: they are not one per sample or token of x.
        """
        told = self.decision.tasks
        if told is None:
            raise RuntimeError(
                "task_ids: expected the batch's tasks before a forward; say them with"
                " lora_moe.use_routing(model, task_ids=) or lora_moe.set_routing"
            )
        if isinstance(told, int):
            return torch.full((math.prod(x.shape[:-1]),), told, device=x.device)
        return fit_rows(told, x, "task_ids").indices[:, 0].long()

    def sample_tasks(self, x: torch.Tensor) -> torch.Tensor | None:
        """(B,) int64: the task of each sample of x (B, L, D), or None where tokens were told their own.

        Raises:
            As tasks.
        """
        told = self.decision.tasks
        if told is None:
            return self.tasks(x)  # raises
        if isinstance(told, int):
            return torch.full(x.shape[:1], told, device=x.device) if x.dim() == 3 else None
        rows = sample_rows(told, x, "task_ids")
        return None if rows is None else rows.indices[:, 0].long()

    def mask(self, x: torch.Tensor) -> torch.Tensor | None:
        """(T,) bool: which tokens of x (..., D) are none of padding; None where all are."""
        return Tokens(x.shape, self._given_mask()).counted()

    def _given_mask(self):
        told = self.decision.mask
        return self.decision.reading.mask if told is None else told

    def prompt(self, x: torch.Tensor) -> torch.Tensor | None:
        """(B, L) bool of x (B, L, D): tokens that may decide for their sequence; None where all may.

        Padding may not, nor may what a causal model's loss asks for: tokens from the first label on.

        Raises:
            ValueError: the mask is not (B, L).
        """
        mask, labels = self._given_mask(), self.decision.reading.labels
        if mask is not None and (mask.dim() != 2 or mask.shape != x.shape[:2]):
            expected = "(B, L)" if mask.dim() != 2 else f"{tuple(x.shape[:2])} as x"
            raise ValueError(f"attention_mask: expected {expected}, got {tuple(mask.shape)}")
        mask = None if mask is None else mask.to(x.device) != 0
        if labels is None or labels.shape != x.shape[:2]:
            return mask
        labels = labels.to(x.device)
        real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
        prompt = real & ((labels != IGNORED).cumsum(1) == 0)
        return prompt.scatter(1, first_of(real)[:, None], True)  # one token in any case


class Component:
    """The base of routers and middles.

    Attributes:
        kind: the tag in files, {"kind": "task", "num_tasks": 3}; one class has it.
        known: {kind: class}, of routers and of middles each.
    """

    kind: ClassVar[str]
    known: ClassVar[dict[str, type[Component]]]
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]  # each subclass is a dataclass

    @property
    def task_count(self) -> int | None:
        """How many tasks it tells apart, None if it reads none: `num_tasks`, where there is such a field."""
        return getattr(self, "num_tasks", None)

    def tensors(self, config: LoraMoeConfig, D_in: int, D_out: int) -> dict[str, TensorSpec]:
        """What the layer is to register, by name; fp32, or fp64 beside fp64."""
        return {}

    def to_dict(self) -> dict:
        """{"kind": kind, **fields} in plain lists, strings and numbers."""
        fields = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"kind": self.kind} | fields

    @classmethod
    def from_dict(cls, fields: dict, depth: int = 0) -> Component:
        """The inverse of to_dict.

        Raises:
            ValueError: an unknown kind or field, or a value does not fit.
        """
        name = cls.__name__.lower()
        if not isinstance(fields, dict) or depth > MAX_DEPTH:
            raise ValueError(f"{name}: expected a dict with a kind, got {brief(fields)}")
        kind = fields.get("kind")
        component = cls.known.get(kind) if isinstance(kind, str) else None
        if component is None:
            raise ValueError(
                f"{name}: expected a kind of {sorted(cls.known)}, got {brief(kind)}; a class of your"
                " own must be imported first"
            )
        own = {field.name for field in dataclasses.fields(component)}
        unknown = [field for field in fields if field != "kind" and field not in own]
        expect(not unknown, f"{name} {kind!r}", f"the fields {sorted(own)}", unknown)
        values = {f: _read(cls, v, depth) for f, v in fields.items() if f != "kind"}
        try:
            return component(**values)
        except TypeError as error:  # a field without a default is missing
            raise ValueError(f"{name} {kind!r}: {error}") from None


def plain(value):
    """A component as a dict, a tuple as a list, as JSON has them."""
    if isinstance(value, Component):
        return value.to_dict()
    return [plain(v) for v in value] if isinstance(value, tuple) else value


def _read(family, value, depth):
    if isinstance(value, dict):
        return family.from_dict(value, depth + 1)
    if isinstance(value, list):
        if any(isinstance(v, (list, dict)) for v in value):
            value = [tuple(v) if isinstance(v, list) else v for v in value]
        return tuple(value)
    return value


def first_of(mask: torch.Tensor) -> torch.Tensor:
    """(B, L) -> (B,), where each row's first true element stands; 0 without any."""
    return (mask != 0).int().argmax(1)


def register(cls):
    """A class decorator: files and configurations know the router or middle by its `kind` from now on.

    Raises:
        TypeError: it is no frozen dataclass.
        ValueError: another class has its kind.
    """
    parameters = getattr(cls, "__dataclass_params__", None)
    if not issubclass(cls, Component) or parameters is None or not parameters.frozen:
        raise TypeError(f"{cls.__name__}: expected a frozen dataclass of Router or Middle")
    other = cls.known.get(cls.kind, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{cls.__name__}: expected a kind of its own, got {cls.kind!r}, {other}'s")
    cls.known[cls.kind] = cls
    return cls


def count(name: str, value, high: int, low: int = 1) -> int:
    """A field's integer in [low, high]; raises ValueError."""
    expect(
        type(value) is int and low <= value <= high, name, f"an integer in [{low}, {high}]", value
    )
    return value


def one_of(name: str, value, known) -> None:
    expect(isinstance(value, str) and value in known, name, f"one of {tuple(known)}", value)
