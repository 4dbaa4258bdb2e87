"""Experts by module path, as importers return them, and writing them as an adapter file.

Letters: E experts, R rank rows of all experts together, r one expert's rank, D_in and D_out a linear's
sizes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import NamedTuple

import torch
from torch import nn

from .. import safefile
from ..components import count
from ..config import MAX_EXPERTS, LoraMoeConfig
from ..io import save_adapter
from ..layers import LoraMoeLinear
from ..linear import ffn_width
from ..mlp import LoraMoeMLP
from .source import Source

NO_LOSSES = {"balance_coef": 0.0, "z_coef": 0.0}


class Experts(NamedTuple):
    """The experts of one linear layer, with the single tensor of their router."""

    config: LoraMoeConfig
    lora_A: torch.Tensor  # (R, D_in), (r, D_in) if shared
    lora_B: torch.Tensor  # (R, D_out)
    router: torch.Tensor  # (E, D_in) of a token router
    router_name: str = "router_weight"


class FfnExperts(NamedTuple):
    """The experts of one FFN, with a token router; config does not contain the layers' names."""

    config: LoraMoeConfig
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]  # {name: (lora_A, lora_B)}
    router_weight: torch.Tensor  # (E, D)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(D_in, D_out) of each adapted linear layer, and of a first or last one without experts."""
        sizes = {name: (A.shape[1], B.shape[1]) for name, (A, B) in self.pairs.items()}
        D = self.router_weight.shape[1]
        if all(D_in == D for D_in, _ in sizes.values()):
            sizes["last"] = min(D_out for _, D_out in sizes.values()), D
        elif all(D_out == D for _, D_out in sizes.values()):
            sizes = {"first": (D, next(iter(sizes.values()))[0])} | sizes
        return sizes


class Place(nn.Module):
    """A placeholder for a linear layer that is not loaded."""

    def __init__(self, D_in: int, D_out: int):
        super().__init__()
        self.in_features, self.out_features = D_in, D_out


def places(sizes: dict[str, tuple[int, int]]) -> nn.Module:
    """A model that consists only of a Place at each path.

    Raises:
        ValueError: if a path cannot be a module's, or is inside another one.
    """
    model = nn.Module()
    for path, size in sizes.items():
        *above, last = path.split(".")
        parent = model
        try:
            for name in above:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent._modules[name]
            if isinstance(parent, Place) or last in parent._modules:
                raise KeyError("it is inside another one")
            parent.add_module(last, Place(*size))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{ascii(path)[1:-1][:200]}: expected a module's path, got {error}"
            ) from None
    return model


def write(directory: str | os.PathLike, bank: dict[str, Experts | FfnExperts]) -> Path:
    """Write the adapter file for load_adapter, with the tensors in their original dtypes.

    Raises:
        ValueError: if a tensor has NaN or infinite values, a path cannot be a module's, or the sizes of an
            FFN's linear layers do not match.
        OSError: if the file cannot be written.
    """
    sizes = {}
    for path, experts in bank.items():
        if isinstance(experts, FfnExperts):
            sizes |= {f"{path}.{name}": size for name, size in experts.sizes().items()}
        else:
            sizes[path] = experts.lora_A.shape[1], experts.lora_B.shape[1]
    model = places(sizes)
    for path, experts in bank.items():
        parent, _, name = path.rpartition(".")
        parent = model.get_submodule(parent)
        with torch.device("meta"):
            layer, values = _layer(path, parent._modules[name], experts)
        for field, value in values.items():
            setattr(layer, field, nn.Parameter(value, requires_grad=False))
        parent._modules[name] = layer
    return save_adapter(model, directory)


def _layer(path, module, experts):
    """A layer on the meta device, and the values of its tensors."""
    if not isinstance(experts, FfnExperts):
        values = {"lora_A": experts.lora_A, "lora_B": experts.lora_B}
        values[experts.router_name] = experts.router
        return LoraMoeLinear(module, experts.config), values
    if ffn_width(module) != experts.router_weight.shape[1]:
        raise ValueError(f"{path}: expected linear layers of an FFN, got {experts.sizes()}")
    values = {"router_weight": experts.router_weight}
    for name, (A, B) in experts.pairs.items():
        values |= {f"lora_A_{name}": A, f"lora_B_{name}": B}
    config = dataclasses.replace(experts.config, target_modules=tuple(experts.pairs))
    return LoraMoeMLP(module, config), values


# --- for the importers -------------------------------------------------------------------------------


def gather(source: Source, keys_A: Sequence[str], keys_B: Sequence[str]):
    """lora_A (R, D_in) and lora_B (R, D_out) of experts' A (r, D_in) and B (D_out, r)."""
    A = torch.cat([source.read(key) for key in keys_A])
    B = torch.cat([source.read(key).T for key in keys_B])
    return A.contiguous(), B.contiguous()


def expect_pairs(source: Source, pairs: Iterable[tuple[str, str, int]], gate: str | None, E: int):
    """Problems of experts (key of A, key of B, r) and of their router's key, one per line."""
    problems, widths = [], set()
    for a, b, r in pairs:
        shape_a, shape_b = source.shape(a), source.shape(b)
        if len(shape_a) != 2 or shape_a[0] != r:
            problems.append(f"{a}: expected ({r}, D_in), got {shape_a}")
        elif len(shape_b) != 2 or shape_b[1] != r:
            problems.append(f"{b}: expected (D_out, {r}), got {shape_b}")
        else:
            widths.add((shape_a[1], shape_b[0]))
    if len(widths) > 1:
        problems.append(f"{a}: expected experts of equal size, got (D_in, D_out) {sorted(widths)}")
    elif widths and gate is not None:
        expected = (E, next(iter(widths))[0])
        if source.shape(gate) != expected:
            problems.append(f"{gate}: expected {expected}, got {source.shape(gate)}")
    return problems


def expect_floats(source: Source, keys: Iterable[str]) -> list[str]:
    """Problems: one line per tensor that is not floating-point."""
    kinds = list(safefile.DTYPES)
    found = ((key, source.places[key].dtype) for key in keys)
    return [
        f"{key}: expected one of {kinds}, got {ascii(d)[:50]}" for key, d in found if d not in kinds
    ]


def refuse_unknown(source: Source, keys: Iterable[str], fields: Iterable[str], kind: str) -> None:
    """Raise ValueError that names the tensors and configuration fields that would be lost."""
    lost = [f"tensor {ascii(key)[:200]}" for key in keys]
    lost = [*fields, *lost]
    if lost:
        more = f" and {len(lost) - 12} more" if lost[12:] else ""
        raise ValueError(
            f"{source.name}: expected only tensors and fields of {kind}, got {', '.join(lost[:12])}{more},"
            " which this importer does not support and would lose"
        )


def unknown_fields(config: dict, known: Iterable[str]) -> list[str]:
    """field=value of fields that are set but unknown."""
    known = set(known)
    return [
        f"{field}={brief(value)}"
        for field, value in config.items()
        if field not in known and value not in (None, False, "none", [], {}, "")
    ]


def number(source: Source, field: str, default=None):
    """A field that must be a number; LoraMoeConfig checks the range."""
    return number_in(source.name, source.config, field, default)


def number_in(name: str, config: dict, field: str, default=None):
    value = config.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: {field}: expected a number, got {brief(value)}")
    return value


def num_experts(source: Source) -> int:
    E = source.config.get("num_experts")
    return count(f"{source.name}: num_experts", E, MAX_EXPERTS)


def common(source: Source, paths: Iterable[str]) -> dict:
    """Fields that all formats share: the dropout, and the last names of the modules."""
    dropout = number(source, "lora_dropout") if source.config.get("lora_dropout") else 0.0
    return {"dropout": dropout, "target_modules": {path.rpartition(".")[2] for path in paths}}
