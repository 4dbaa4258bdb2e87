"""Reads and writes PEFT's format of LoRAs on fused experts (LoraConfig(target_parameters=)).

    <experts>.lora_A.weight (E r, D_in), ordered by expert, then rank
    <experts>.lora_B.weight (D_out, r E), ordered by rank, then expert

There is one pair per parameter, in the module's order: the last parameter's at the path of the module, the
one before at <experts>.base_layer, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as brief

import torch
from torch import nn

from . import fused, peft_format, safefile
from .config import LoraMoeConfig
from .native_experts import LoraMoeExperts
from .peft_lora import Lora, unsupported_numbers
from .sharded import plain_path
from .target_parameters import unsupported_experts
from .targets import matches


def rows_of(B: torch.Tensor, E: int) -> torch.Tensor:
    """PEFT's lora_B (D_out, r E) as rows (E r, D_out)."""
    return B.unflatten(1, (-1, E)).permute(2, 1, 0).flatten(0, 1)


def columns_of(rows: torch.Tensor, E: int) -> torch.Tensor:
    """The inverse of rows_of."""
    return rows.unflatten(0, (E, -1)).permute(2, 1, 0).flatten(1)


def nested(path: str, names: list[str] | tuple[str, ...]) -> dict[str, str]:
    """{parameter: path of its tensors in the file}, for names in the module's order."""
    return {name: path + ".base_layer" * i for i, name in enumerate(reversed(names))}


# --- reading ---------------------------------------------------------------------------------------


class Found:
    """A module with parameters that an adapter targets, and the keys of their tensors."""

    def __init__(self, path, module, names, lora):
        self.path, self.module, self.lora = path, module, lora
        self.paths = nested(path, names)  # {parameter: path in the file}

    def problems(self) -> list[str]:
        """One line per problem."""
        problems, kinds = [], set()
        for name, path in self.paths.items():
            E, D_in, D_out = fused.sizes(self.module, name)
            r, alpha = self.rank(name), self.alpha(name)
            if unsupported := unsupported_numbers(r, alpha):
                return [unsupported]
            kinds.add((r, float(alpha)))
            shapes = {"A": (E * r, D_in), "B": (D_out, r * E)}
            problems += self.lora.misfits(path, f" of {name}", **shapes)
        if len(kinds) > 1:
            problems.append(
                f"(r, lora_alpha): expected one pair for the experts' parameters, got {sorted(kinds)}"
            )
        return problems

    def rank(self, name):
        return self.lora.rank(f"{self.path}.{name}")

    def alpha(self, name):
        return self.lora.alpha(f"{self.path}.{name}")

    def layer(self, fields: Mapping) -> LoraMoeExperts:
        """The layer with initial rows; raises ValueError for fields that configure a router."""
        name = next(iter(self.paths))
        config = LoraMoeConfig(
            **{key: value for key, value in fields.items() if key != "target_modules"},
            target_parameters=tuple(self.paths),
            r=self.rank(name),
            alpha=float(self.alpha(name)),
            use_rslora=self.lora.config.get("use_rslora", False),
        )
        return LoraMoeExperts(self.module, config)

    def read(self, read) -> dict[str, tuple[torch.Tensor, torch.dtype]]:
        """{name of the layer's tensor: (value, dtype in the file)}; read(key) returns the file's tensor."""
        values = {}
        for name, path in self.paths.items():
            for letter, own in zip("AB", fused.tensor_names(name)):
                key = self.lora.tensors[path, letter]
                value = read(key)
                if letter == "B":
                    value = rows_of(value, fused.sizes(self.module, name)[0])
                values[own] = value, safefile.DTYPES[self.lora.places[key].dtype]
        return values


def experts_in(model: nn.Module, lora: Lora) -> tuple[list[Found], Lora]:
    """The adapter's LoRAs on the model's own experts, and the adapter without these.

    Raises:
        ValueError: if target_parameters match nothing, or something does not fit; every problem is listed.
    """
    targets = lora.config["target_parameters"]
    if not isinstance(targets, list) or not all(isinstance(t, str) and t for t in targets):
        raise ValueError(f"{lora.name}: target_parameters: expected names, got {brief(targets)}")
    named = {}
    for path, module in model.named_modules():
        names = [n for n in module._parameters if matches(f"{path}.{n}", tuple(targets))]
        if names:
            named[path] = names
    if not named:
        raise ValueError(f"{lora.name}: target_parameters: the model has none of {brief(targets)}")
    reasons = unsupported_experts(model, named)
    found = [
        Found(path, model.get_submodule(path), names, lora)
        for path, names in named.items()
        if path not in reasons
    ]
    problems = [f"{path}: {reason}" for path, reason in reasons.items()]
    problems += [f"{one.path}: {problem}" for one in found for problem in one.problems()]
    safefile.raise_all(f"{lora.name}: expected LoRAs on the model's own experts", problems)
    taken = {path for one in found for path in one.paths.values()}
    rest = {key: value for key, value in lora.tensors.items() if key[0] not in taken}
    return found, lora._replace(tensors=rest)


# --- writing ---------------------------------------------------------------------------------------


def names_in_order(layer: LoraMoeExperts) -> list[str]:
    """The adapted parameters, in PEFT's nesting order."""
    return [n for n in layer.base_layer._parameters if n in layer.config.target_parameters]


def tensors_of(path: str, layer: LoraMoeExperts, sources: Mapping) -> dict[str, tuple]:
    """{PEFT's key: (tensor, our name)} from {(path, our name): tensor}."""
    tensors, E = {}, layer.config.num_experts
    for name, place in nested(path, names_in_order(layer)).items():
        for letter, own in zip("AB", fused.tensor_names(name)):
            value = sources[path, own]
            value = columns_of(value, E) if letter == "B" else value
            tensors[f"{peft_format.PREFIX}{place}.lora_{letter}.weight"] = value, own
    return tensors


def targets_of(model: nn.Module, layers: Mapping[str, LoraMoeExperts]) -> list[str]:
    """target_parameters for PEFT: short names if they match nothing else, else full paths."""
    own = [f"{path}.{name}" for path, layer in layers.items() for name in names_in_order(layer)]
    here = [plain_path(p).replace(".base_layer", "") for p, _ in model.named_parameters()]
    short = sorted({".".join(path.split(".")[-3:]) for path in own})
    return short if {p for p in here if matches(p, tuple(short))} == set(own) else sorted(own)


def expect_one_rank(layers: Mapping[str, LoraMoeExperts]) -> None:
    """Raise unless all experts have one rank and one alpha, as PEFT requires."""
    for path, layer in layers.items():
        for field in ("r", "lora_alpha"):
            value = getattr(layer.config, field.removeprefix("lora_"))
            if isinstance(value, tuple) and len(set(value)) > 1:
                raise ValueError(
                    f"model: expected one {field} for all experts of {path}, as PEFT requires, got {value}"
                )
