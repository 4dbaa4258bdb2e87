"""Lora: one PEFT LoRA adapter, validated before any of its tensors is read.

    <module path>.lora_A.weight (r, D_in),   <module path>.lora_B.weight (D_out, r)

Keys have PEFT's prefix "base_model.model.", which a state dict may omit.  Fields and tensors that a bank of
experts cannot represent raise by name.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from reprlib import repr as brief
from typing import NamedTuple

import torch

from . import locate, peft_format, safefile
from .fields import MAX_COEFFICIENT, MAX_RANK

_KEY = re.compile(r"([\w.]+)\.lora_([AB])\.weight", re.ASCII)
# fields that determine the LoRA's function
_CARRIED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"}
# fields that only locate the LoRA, as its tensors do, or do not affect the trained function
SILENT = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "runtime_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
# other initializations change the base's weights, so the saved LoRA does not fit the original base
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class Lora(NamedTuple):
    """A validated adapter whose tensors have not been read yet."""

    name: str  # for messages
    config: dict
    tensors: dict[tuple[str, str], str]  # (module path, "A" or "B"): key
    places: dict[str, safefile.Slice]  # by key; for a state dict only dtype and shape
    read: Callable[[str], torch.Tensor]

    def rank(self, path: str):
        return peft_format.rank_at(self.config, path)

    def alpha(self, path: str):
        return peft_format.alpha_at(self.config, path)

    def misfits(self, path: str, of: str = "", **shapes: tuple[int, int]) -> list[str]:
        """Problems of lora_A and lora_B at a path: missing, or not of these shapes."""
        problems = []
        for letter, shape in shapes.items():
            key = self.tensors.get((path, letter))
            if key is None:
                problems.append(f"lora_{letter}{of} is missing")
                continue
            dtype, got = self.places[key][:2]
            if got != shape:
                problems.append(f"lora_{letter}{of}: expected {shape}, got {got}")
            if dtype not in safefile.DTYPES:
                known = list(safefile.DTYPES)
                problems.append(f"lora_{letter}{of}: expected one of {known}, got {dtype}")
        return problems

    @property
    def paths(self) -> list[str]:
        return list(dict.fromkeys(path for path, _ in self.tensors))


def opened(stack: contextlib.ExitStack, index: int, source, revision=None) -> Lora:
    """Open adapters[index] of from_peft; the file stays open as long as the stack."""
    if isinstance(source, str | os.PathLike):
        found = locate.find(source, (peft_format.FILES,), revision)
        if found is None:
            raise FileNotFoundError(_nothing(source))
        tensors = safefile.open_tensors(stack, found[0])
        return checked(str(source), peft_format.read_config(found[1]), *tensors)
    pair = isinstance(source, tuple | list) and len(source) == 2 and isinstance(source[0], Mapping)
    config = _as_dict(source[1]) if pair else None
    if config is None:
        raise ValueError(
            f"adapters[{index}]: expected a directory or a pair (state dict, LoraConfig), which has the"
            f" ranks and alphas, got {brief(source)[:80]}"
        )
    state = source[0]
    odd = [key for key, t in state.items() if not isinstance(t, torch.Tensor)]
    if odd:
        raise ValueError(f"adapters[{index}]: expected tensors, got {type(state[odd[0]]).__name__}")
    places = safefile.places_in_memory(state)
    return checked(f"adapters[{index}]", config, places, state.__getitem__)


def _nothing(source):
    hint = ""
    if os.path.isdir(source):
        found = sorted(os.listdir(source))[:20]
        if "adapter_model.bin" in found:
            hint = (
                "; pickles run code and are not opened: save it again with safe_serialization=True"
            )
        hint = f", found {found}{hint}"
    return f"{source}: expected {' and '.join(peft_format.FILES)} in it{hint}"


def _as_dict(config):
    config = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(config, Mapping):
        return None
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def checked(name, config, places, read) -> Lora:
    """Raise if a bank of experts cannot represent the configuration or the tensors."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{name}: expected peft_type 'LORA', got {brief(kind)}")
    lost = _lost(config)
    tensors, strange = {}, []
    for key in places:
        match = _KEY.fullmatch(peft_format.module_path(key))
        if match and match.groups() not in tensors:
            tensors[match.groups()] = key
        else:
            strange.append(key)
    lost += [f"tensor {ascii(key)[:200]}" for key in strange[:8]]
    if lost or strange:
        raise ValueError(
            f"{name}: expected a plain LoRA on linear modules, got {', '.join(lost)}"
            f"{f' and {len(strange) - 8} more tensors' if strange[8:] else ''},"
            " which a bank of experts cannot represent"
        )
    if not tensors:
        raise ValueError(f"{name}: expected tensors, got none")
    config = dict(config)
    for field in ("rank_pattern", "alpha_pattern"):
        peft_format.expect_patterns(f"{name}: {field}", config.get(field))
    if not isinstance(config.get("use_rslora", False), bool):
        raise ValueError(f"{name}: use_rslora: expected a bool, got {brief(config['use_rslora'])}")
    return Lora(name, config, tensors, places, read)


def unsupported_numbers(r, alpha) -> str | None:
    """Why r and alpha are not valid for an expert, or None."""
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        return f"r: expected an integer in [1, {MAX_RANK}], got {brief(r)}"
    if type(alpha) not in (int, float) or not 0 <= alpha <= MAX_COEFFICIENT:
        return f"lora_alpha: expected a number in [0, {MAX_COEFFICIENT:g}], got {brief(alpha)}"
    return None


def _lost(config):
    """The fields that a bank cannot represent, as "field=value"."""
    found = []
    for field, value in config.items():
        if field == "init_lora_weights" and value not in _PLAIN_STARTS:
            found.append(
                f"{field}={brief(value)} (it changes the base; save it with"
                " path_initial_model_for_weight_conversion=)"
            )
        elif field not in _CARRIED | SILENT and value not in (None, False, "none", [], {}, ""):
            found.append(f"{field}={brief(value)}")
    return found
