"""Every loader of the package, paired with the saver of its files, for tests that damage files.

A loader may raise ValueError or OSError, and nothing else, whatever the file contains.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import lora_moe
from lora_moe import LoraMoeConfig, safefile
from lora_moe.methods import branch_lora, c_lorae, mmolre
from lora_moe.methods.branch_lora.continual import TaskSelector

NIGHTLY = int(os.environ.get("LORA_MOE_NIGHTLY") or 1)  # factor on files, calls and seconds
DOCUMENTED = (ValueError, OSError)


class Loader(NamedTuple):
    """A loader, the saver of its files, and constructors of the models they take."""

    file: str
    key: str  # metadata key of the description
    model: Callable  # width -> a model with experts, to save
    save: Callable  # model, folder
    fresh: Callable  # width -> a model to load into
    load: Callable  # model, folder


class Host(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q = nn.Linear(width, 6)
        self.v = nn.Linear(width, 5)
        self.projector = nn.Linear(3, 2)

    def forward(self, x):
        return self.q(x), self.v(x)


CONFIG = LoraMoeConfig(num_experts=3, r=2, top_k=2, target_modules=("q", "v"))


def with_experts(width):
    return lora_moe.inject(Host(width), CONFIG)


def with_tasks(width):
    config = c_lorae.CLoraeConfig(num_tasks=2, r=4, alpha=4, target_modules=("q", "v"))
    return c_lorae.inject(Host(width), config)


def with_branches(width):
    model = Host(width)
    config = branch_lora.branch_lora(3, 2, 2, 4.0, target_modules=("q", "v"))
    branch_lora.inject(model, config, modules_to_save=("projector",))
    branch_lora.begin_task(model)
    return model


def save_branches(model, folder):
    selector = TaskSelector(6, 4)
    selector.begin_task()
    branch_lora.save(model, folder, selector)


def multimodal(width):
    tasks = {"a": mmolre.Task("mae"), "b": mmolre.Task("multiclass", 5)}
    modalities = {"text": 6, "audio": width}
    return mmolre.MMoLRE(
        mmolre.MMoLREConfig(modalities, tasks, width=width, shared_ranks=(2, 3), task_rank=2)
    )


LOADERS = {
    "load_adapter": Loader(
        "lora_moe.safetensors", "lora_moe", with_experts, lora_moe.save_adapter, Host,
        lora_moe.load_adapter,
    ),
    "load_adapter, into experts": Loader(
        "lora_moe.safetensors", "lora_moe", with_experts, lora_moe.save_adapter, with_experts,
        lora_moe.load_adapter,
    ),
    "adapter_info": Loader(
        "lora_moe.safetensors", "lora_moe", with_experts, lora_moe.save_adapter, lambda width: None,
        lambda model, folder: lora_moe.adapter_info(folder),
    ),
    "c_lorae": Loader(
        "c_lorae.safetensors", "c_lorae", with_tasks, c_lorae.save, with_tasks, c_lorae.load
    ),
    "branch_lora": Loader(
        "branch_lora.safetensors", "branch_lora", with_branches, save_branches, Host,
        branch_lora.load,
    ),
    "mmolre": Loader(
        "mmolre.safetensors", "mmolre", multimodal,
        lambda model, folder: mmolre.save(model, folder / "mmolre.safetensors"), lambda width: None,
        lambda model, folder: mmolre.load(folder / "mmolre.safetensors"),
    ),
}  # fmt: skip
SAVERS = ("load_adapter", "c_lorae", "branch_lora", "mmolre")  # one for each kind of file


def saved(loader: Loader, folder: Path, width: int = 8) -> Path:
    torch.manual_seed(0)
    loader.save(loader.model(width), folder)
    return folder / loader.file


def raw(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def parts(content: bytes) -> tuple[dict, bytes]:
    """(header, data) of a file."""
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def described(content: bytes, key: str, change: Callable) -> bytes:
    """The file with its description changed by change(description), in place or by returning a new one."""
    header, data = parts(content)
    found = json.loads(header["__metadata__"][key])
    new = change(found)
    header["__metadata__"][key] = json.dumps(found if new is None else new)
    return raw(header, data)


def slices(path):
    with safefile.open_regular(path) as file:
        return safefile.read_header(file)[1]
