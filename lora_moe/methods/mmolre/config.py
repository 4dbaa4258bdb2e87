"""MMoLREConfig: all options of a model, validated before anything is allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from ...components import count
from ...fields import MAX_COEFFICIENT, MAX_RANK, expect, fields_of
from .checks import MAX_NAMES, named, number

ACTIVATIONS = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
ROUTES = ("token", "mean")
LOSSES = ("mae", "mse", "multiclass", "multilabel")
MAX_WIDTH = 65_536


def expect_options(activation, route):
    """Check the options of a block."""
    known = activation in tuple(ACTIVATIONS)
    expect(known, "activation", f"one of {[*ACTIVATIONS]}", activation)
    expect(route in ROUTES, "route", f"one of {ROUTES}", route)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task's output and its loss.

    Args:
        loss: "mae" or "mse" (regression), "multiclass" (cross-entropy of class ids) or "multilabel"
            (binary cross-entropy of each output).
        outputs: numbers per item: 1 for a sentiment score, or the number of emotions.
        weight: weight of this loss in the sum; in [0, 1e6].
    """

    loss: str = "mae"
    outputs: int = 1
    weight: float = 1.0

    def __post_init__(self):
        expect(self.loss in LOSSES, "loss", f"one of {LOSSES}", self.loss)
        count("outputs", self.outputs, MAX_WIDTH)
        number("weight", self.weight, MAX_COEFFICIENT)


@dataclasses.dataclass(frozen=True)
class MMoLREConfig:
    """All options of the model, validated before anything is allocated.

    Args:
        modalities: {name: features per position}, one or more, such as {"text": 768, "audio": 74}.
        tasks: {name: Task}.
        width: D of the experts' inputs and outputs; features of other widths are projected first.
        shared_ranks: rank of each shared expert; they may differ.
        task_rank: rank of each task's expert in a block; 0 for none.
        blocks: number of stacked UniTSE blocks per modality.
        activation: phi, one of "relu", "gelu", "silu", "tanh".
        route: "token": gates at each position; "mean": one set of gates per item, from its mean.
        residual: add a block's input to its output.
        dropout: on the fused vector in training; in [0, 1).
        hard_sharing: the baseline: one stream for all tasks, so one router and no task experts
            (task_rank is 0); fusion and heads remain separate.
    Raises:
        ValueError: if a field is invalid; the message names the field, what was expected and its value.
    """

    modalities: Mapping[str, int]
    tasks: Mapping[str, Task]
    width: int = 768
    shared_ranks: tuple[int, ...] = (16, 16, 16, 16)
    task_rank: int = 16
    blocks: int = 2
    activation: str = "relu"
    route: str = "token"
    residual: bool = False
    dropout: float = 0.0
    hard_sharing: bool = False

    def __post_init__(self):
        for name in ("modalities", "tasks"):
            object.__setattr__(self, name, named(name, getattr(self, name)))
        for name, features in self.modalities.items():
            count(f"modalities[{name!r}]", features, MAX_WIDTH)
        for name, task in self.tasks.items():
            expect(isinstance(task, Task), f"tasks[{name!r}]", "a Task", task)
        count("width", self.width, MAX_WIDTH)
        ranks = self.shared_ranks
        many = isinstance(ranks, (list, tuple)) and 1 <= len(ranks) <= MAX_NAMES
        expect(many, "shared_ranks", f"1 to {MAX_NAMES} ranks", ranks)
        for n, rank in enumerate(ranks):
            count(f"shared_ranks[{n}]", rank, MAX_RANK)
        object.__setattr__(self, "shared_ranks", tuple(ranks))
        count("task_rank", self.task_rank, MAX_RANK, 0)
        count("blocks", self.blocks, MAX_NAMES)
        expect_options(self.activation, self.route)
        for name in ("residual", "hard_sharing"):
            expect(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        number("dropout", self.dropout, 1)
        expect(self.dropout < 1, "dropout", "a probability in [0, 1)", self.dropout)
        own = self.hard_sharing and self.task_rank
        expect(not own, "task_rank", "0 with hard_sharing, which has no task experts", own)

    def to_dict(self) -> dict:
        """The fields as plain lists, strings and numbers; from_dict(config.to_dict()) == config."""
        return dataclasses.asdict(self) | {"shared_ranks": list(self.shared_ranks)}

    @classmethod
    def from_dict(cls, fields: dict) -> MMoLREConfig:
        """The inverse of to_dict; raises ValueError."""
        fields = fields_of(cls, "config", fields)
        tasks = fields.get("tasks")
        if isinstance(tasks, dict):
            made = {
                name: Task(**fields_of(Task, f"tasks[{name!r}]", t)) for name, t in tasks.items()
            }
            fields = fields | {"tasks": made}
        missing = [name for name in ("modalities", "tasks") if name not in fields]
        expect(not missing, "config", "modalities and tasks", f"none of {missing}")
        return cls(**fields)
