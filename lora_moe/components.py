"""Component, the base class of routers and middles, and Batch, what a forward passes to them.

Components are frozen dataclasses and own no tensors.  They declare the tensors that they need; the layer
registers these and passes them to the component in each forward.
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
IGNORED = -100  # the label of tokens that a loss ignores
normal = functools.partial(nn.init.normal_, std=ROUTER_STD)


class TensorSpec(NamedTuple):
    """One tensor that the layer registers for a component.

    shape   of any number of dimensions
    init    fills it in place
    trains  a parameter; False makes it a buffer
    """

    shape: tuple[int, ...]
    init: Callable[[torch.Tensor], object] = normal
    trains: bool = True


class Batch(NamedTuple):
    """The context of a layer's forward, besides its input.

    samples: the routing with one row per sample if all tokens of a sample share it; for middles.
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
        """Whether a cache holds earlier tokens."""
        return cache_in_use() is not None

    @property
    def one_task(self) -> int | None:
        """The task of all tokens, if the caller gave a single number."""
        told = self.decision.tasks
        return told if isinstance(told, int) else None

    def tasks(self, x: torch.Tensor) -> torch.Tensor:
        """(T,) int64: the task of each token of x (..., D), -1 for none.

        Raises:
            RuntimeError: if no task ids were set.
            ValueError: if there is not one per sample or per token of x.
        """
        told = self.decision.tasks
        if told is None:
            raise RuntimeError(
                "task_ids: expected the batch's tasks before a forward; set them with"
                " lora_moe.use_routing(model, task_ids=) or lora_moe.set_routing"
            )
        if isinstance(told, int):
            return torch.full((math.prod(x.shape[:-1]),), told, device=x.device)
        return fit_rows(told, x, "task_ids").indices[:, 0].long()

    def sample_tasks(self, x: torch.Tensor) -> torch.Tensor | None:
        """(B,) int64: the task of each sample of x (B, L, D), or None if tasks are per token.

        Raises:
            As in tasks.
        """
        told = self.decision.tasks
        if told is None:
            return self.tasks(x)  # raises
        if isinstance(told, int):
            return torch.full(x.shape[:1], told, device=x.device) if x.dim() == 3 else None
        rows = sample_rows(told, x, "task_ids")
        return None if rows is None else rows.indices[:, 0].long()

    def mask(self, x: torch.Tensor) -> torch.Tensor | None:
        """(T,) bool: which tokens of x (..., D) are not padding; None if none is."""
        return Tokens(x.shape, self._given_mask()).counted()

    def _given_mask(self):
        told = self.decision.mask
        return self.decision.reading.mask if told is None else told

    def prompt(self, x: torch.Tensor) -> torch.Tensor | None:
        """(B, L) bool of x (B, L, D): tokens that may determine their sequence's routing; None if all may.

        Padding is excluded, and so is a causal model's answer: tokens from the first label on.

        Raises:
            ValueError: if the mask is not (B, L).
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
        return prompt.scatter(1, first_of(real)[:, None], True)  # at least one token


class Component:
    """The base of routers and middles.

    Attributes:
        kind: the tag in files, {"kind": "task", "num_tasks": 3}; unique per class.
        known: {kind: class}, separate for routers and for middles.
    """

    kind: ClassVar[str]
    known: ClassVar[dict[str, type[Component]]]
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]  # each subclass is a dataclass

    @property
    def task_count(self) -> int | None:
        """Number of tasks, or None if it reads no task ids; by default the field `num_tasks`, if any."""
        return getattr(self, "num_tasks", None)

    def tensors(self, config: LoraMoeConfig, D_in: int, D_out: int) -> dict[str, TensorSpec]:
        """The tensors that the layer registers, by name; fp32, or fp64 for an fp64 base."""
        return {}

    def to_dict(self) -> dict:
        """{"kind": kind, **fields} as plain lists, strings and numbers."""
        fields = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"kind": self.kind} | fields

    @classmethod
    def from_dict(cls, fields: dict, depth: int = 0) -> Component:
        """The inverse of to_dict.

        Raises:
            ValueError: if a kind or field is unknown, or a value is invalid.
        """
        name = cls.__name__.lower()
        if not isinstance(fields, dict) or depth > MAX_DEPTH:
            raise ValueError(f"{name}: expected a dict with a kind, got {brief(fields)}")
        kind = fields.get("kind")
        component = cls.known.get(kind) if isinstance(kind, str) else None
        if component is None:
            raise ValueError(
                f"{name}: expected a kind from {sorted(cls.known)}, got {brief(kind)}; import a custom"
                " class before loading it"
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
    """The value as JSON represents it: a component as a dict, a tuple as a list."""
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
    """(B, L) -> (B,), the index of the first true element of each row; 0 if there is none."""
    return (mask != 0).int().argmax(1)


def register(cls):
    """Class decorator that registers a router or middle under its `kind`, for files and configurations.

    Raises:
        TypeError: if the class is not a frozen dataclass.
        ValueError: if another class has the same kind.
    """
    parameters = getattr(cls, "__dataclass_params__", None)
    if not issubclass(cls, Component) or parameters is None or not parameters.frozen:
        raise TypeError(f"{cls.__name__}: expected a frozen dataclass of Router or Middle")
    other = cls.known.get(cls.kind, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"{cls.__name__}: expected a unique kind, got {cls.kind!r} of {other}")
    cls.known[cls.kind] = cls
    return cls


def count(name: str, value, high: int, low: int = 1) -> int:
    """Check for an integer in [low, high] and return it; raises ValueError."""
    expect(
        type(value) is int and low <= value <= high, name, f"an integer in [{low}, {high}]", value
    )
    return value


def one_of(name: str, value, known) -> None:
    expect(isinstance(value, str) and value in known, name, f"one of {tuple(known)}", value)
