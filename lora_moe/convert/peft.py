"""Converts PEFT LoRAs to a bank of experts and back.

    <path>.lora_A.weight (r, D_in)   <path>.lora_B.weight (D_out, r)     y = W0 x + s B A x

Expert i is the i-th folder; s is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.  The
routers are new.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as brief

import torch

from .. import peft_format, peft_lora
from ..components import ROUTER_STD
from ..from_peft import config_at
from ..io import adapter_info, load_adapter
from ..safefile import raise_all
from ..to_peft import to_peft
from .bank import Experts, expect_floats, expect_pairs, places
from .source import Source, files_in


def folders(source: str | os.PathLike) -> list[Path]:
    """Subfolders with an adapter, expert_2 before expert_10; the folder itself if it is one."""
    source = Path(source)
    if not source.is_dir() or (source / peft_format.CONFIG).exists() or files_in(source):
        return [source]
    found = [p for p in source.iterdir() if (p / peft_format.CONFIG).exists()]
    return sorted(found, key=lambda p: [int(s) if s.isdigit() else s for s in _parts(p.name)])


def _parts(name):
    """Split into alternating text and numbers, text first."""
    return re.split(r"(\d+)", name)


def read(sources: Iterable[Source], notes: list[str], top_k: int | None) -> dict[str, Experts]:
    """{module path: experts}; raises ValueError."""
    loras = [peft_lora.checked(s.name, s.config, s.places, s.read) for s in sources]
    for lora in loras:
        if lora.config.get("target_parameters"):
            raise ValueError(
                f"{lora.name}: expected a LoRA on linear modules, got target_parameters, which need the"
                " model: use load_adapter(model, folder)"
            )
    paths = list(dict.fromkeys(path for lora in loras for path in lora.paths))
    sizes, problems = {}, []
    for lora in loras:
        for path in lora.paths:
            a, b = (lora.tensors.get((path, letter)) for letter in "AB")
            if a is None or b is None:
                problems.append(f"{lora.name}: {path}: lora_{'B' if a else 'A'} is missing")
                continue
            own = Source(lora.name, {}, lora.places, lora.read)
            found = expect_pairs(own, [(a, b, lora.rank(path))], None, 0)
            alpha = lora.alpha(path)
            if type(alpha) not in (int, float):
                found.append(f"{path}: lora_alpha: expected a number, got {brief(alpha)}")
            problems += [f"{lora.name}: {text}" for text in found + expect_floats(own, (a, b))]
            if not found:
                size = own.shape(a)[1], own.shape(b)[0]
                if sizes.setdefault(path, size) != size:
                    problems.append(f"{lora.name}: {path}: expected {sizes[path]}, got {size}")
    raise_all("adapters: expected LoRAs of one model", problems)
    fields = {"top_k": top_k, "target_modules": {p.rpartition(".")[2] for p in paths}}
    notes.append("the routers are new: train them, or route with use_routing(model, task_ids=)")
    return {path: _bank(path, loras, fields, sizes[path]) for path in paths}


def _bank(path, loras, fields, size):
    """An adapter without a LoRA here becomes an expert of rank 1 with a zero lora_B, as in from_peft."""
    D_in, D_out = size
    config, A, B = config_at(path, loras, fields), [], []
    for lora in loras:
        keys = [lora.tensors.get((path, letter)) for letter in "AB"]
        here = keys[0] is not None
        A.append(lora.read(keys[0]) if here else torch.zeros(1, D_in))
        B.append(lora.read(keys[1]).T if here else torch.zeros(1, D_out))
    router = torch.randn(len(loras), D_in) * ROUTER_STD
    return Experts(config, torch.cat(A).contiguous(), torch.cat(B).contiguous(), router)


def write_back(source: str | os.PathLike, directory: str | os.PathLike) -> list[Path]:
    """Write each expert of an adapter as a PEFT folder; the base model is not needed.

    Raises:
        ValueError, OSError: as in load_adapter and to_peft.
    """
    info = adapter_info(source)
    sizes = {}
    for adapter in info["adapters"]:
        if adapter["config"].target_parameters:
            raise ValueError(
                f"{source}: expected experts on linear modules, got LoRAs on a model's own experts, which"
                " need the model: use load_adapter(model, folder), then to_peft(model, folder)"
            )
        for path in adapter["modules"]:
            try:
                shapes = [info["tensors"][f"{path}.lora_{letter}"].shape for letter in "AB"]
                sizes[path] = shapes[0][1], shapes[1][1]
            except (KeyError, IndexError):
                raise ValueError(f"{source}: expected lora_A and lora_B of {path!a:.200}") from None
    return to_peft(load_adapter(places(sizes), source), directory)
