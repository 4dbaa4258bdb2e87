"""The whole continual state in one safetensors file: to go on in the middle of a task.

    branch_lora.safetensors
        tensors   <module path>.{lora_A, branches.<j>, routers.<i>, usage}, <name> of what else trains,
                  selector.{text_keys, image_keys}
        metadata  {"format": "pt", "branch_lora": JSON of the configuration, the tasks and what is frozen}

The file is untrusted, as in lora_moe.io: the model decides keys, shapes and dtypes, and changes last
or not at all.  An optimizer's state is the trainer's to save.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from reprlib import repr as brief

import torch
from torch import nn

from .. import safefile
from ..config import LoraMoeConfig
from ..io import read_tensors
from ..targets import why_not
from .branch_lora import install, parts
from .branch_lora_layer import READS, BranchLoraLinear, Sequences
from .continual import TaskSelector

FILE_NAME = "branch_lora.safetensors"
FORMAT_VERSION = 1
_FIELDS = {
    "version": int,
    "config": dict,
    "reads": str,
    "causal": bool,
    "also": list,
    "bank": list,
    "learning": bool,
    "branches": int,
    "routers": list,
    "frozen": dict,
}


def save(model: nn.Module, directory: str | os.PathLike, selector: TaskSelector | None = None):
    """Write branches, routers, usage, what else trains and the selector's keys; all or nothing.

    Returns:
        The file's path.
    Raises:
        ValueError: the model has no branches.
        OSError: the file cannot be written; an older one is intact.
    """
    layers, sequences = parts(model)
    layer = next(iter(layers.values()))
    description = {
        "version": FORMAT_VERSION,
        "config": layer.config.to_dict(),
        "reads": sequences.reads,
        "causal": sequences.causal,
        "also": list(sequences.also),
        "bank": sequences.bank,
        "learning": sequences.learning,
        "branches": len(layer.branches),
        "routers": [router.shape[0] for router in layer.routers],
        "frozen": {path: list(layer.frozen) for path, layer in layers.items()},
    }
    tensors = _keyed(model, layers, sequences.also) | _keys(selector)
    path = Path(directory) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: t.detach().contiguous() for key, t in tensors.items()}
    safefile.write(path, tensors, {"format": "pt", "branch_lora": json.dumps(description)})
    return path


def load(model: nn.Module, directory: str | os.PathLike) -> TaskSelector | None:
    """Read what save wrote into a model without branches; training goes on where it stood.

    The last task's router decides; see set_task.

    Returns:
        The selector, or None if none was saved.
    Raises:
        ValueError: the file is none of ours, is damaged, does not fit the model (every misfit is
            listed), or holds NaN or infinite values.  The model is unchanged.
        OSError: the file is missing or cannot be read.
    """
    with safefile.open_regular(Path(directory) / FILE_NAME) as file:
        metadata, slices = safefile.read_header(file)
        found = _read_description(file.name, metadata, len(slices))
        layers = _layers(model, found)
        selector = _selector(slices)
        wanted = _keyed(model, layers, found["also"]) | _keys(selector)
        values = read_tensors(file, slices, wanted)
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(values.pop(key))
    install(model, {layer.base_layer: layer for layer in layers.values()})
    for path, layer in layers.items():
        layer.freeze(found["frozen"][path])
        layer.routers.requires_grad_(False)
        if found["learning"]:
            layer.routers[found["bank"][-1]].requires_grad_(True)
    return selector


def _keyed(model, layers, also):
    """{key: tensor} of the layers and of the modules that train beside them."""
    tensors = {
        f"{path}.{name}" if path else name: tensor
        for path, layer in layers.items()
        for name, tensor in layer.state_dict(keep_vars=True).items()
        if not name.startswith("base_layer.")
    }
    for module in also:
        tensors |= {f"{module}.{n}": p for n, p in model.get_submodule(module).named_parameters()}
    return tensors


def _keys(selector):
    return {} if selector is None else {f"selector.{n}": t for n, t in selector.named_buffers()}


def _selector(slices):
    """An empty selector of the saved sizes, if there is one; read_tensors checks the rest."""
    shapes = [
        slices[f"selector.{n}"].shape
        for n in ("text_keys", "image_keys")
        if f"selector.{n}" in slices
    ]
    if not shapes or any(len(shape) != 2 for shape in shapes):
        return None
    selector = TaskSelector(*(shape[1] for shape in shapes))
    for _ in range(shapes[0][0]):
        selector.begin_task()
    return selector


def _read_description(name, metadata, tensors):
    text = metadata.get("branch_lora") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected branch_lora in its metadata; it is no BranchLoRA")
    found = safefile.parse_json(text, name)
    fits = isinstance(found, dict) and found.keys() == _FIELDS.keys()
    if not fits or any(type(found[field]) is not kind for field, kind in _FIELDS.items()):
        raise ValueError(f"{name}: expected the fields {list(_FIELDS)}, got {brief(found)}")
    if found["version"] != FORMAT_VERSION:
        raise ValueError(f"{name}: expected version {FORMAT_VERSION}, got {found['version']}")
    found["config"] = LoraMoeConfig.from_dict(found["config"])
    branches, routers, bank = found["branches"], found["routers"], found["bank"]
    fewest = found["config"].num_experts
    problems = [
        ("reads", found["reads"] in READS),
        ("also", all(type(module) is str for module in found["also"])),
        ("branches", fewest <= branches <= tensors),
        ("routers", len(routers) <= tensors and _numbers(routers, fewest, branches + 1)),
        ("bank", len(bank) >= len(routers) and _numbers(bank, 0, len(routers))),
        ("learning", bool(bank) or not found["learning"]),
        ("frozen", all(_ids(ids, branches) for ids in found["frozen"].values())),
    ]
    wrong = {field: found[field] for field, right in problems if not right}
    if wrong or not found["frozen"]:
        raise ValueError(f"{name}: expected a consistent state, got {brief(wrong)}")
    return found


def _numbers(values, low, high):
    return all(type(n) is int and low <= n < high for n in values)


def _ids(values, high):
    return (
        isinstance(values, list) and _numbers(values, 0, high) and len(set(values)) == len(values)
    )


def _layers(model, found):
    """{path: layer} of the saved structure, not yet in the model."""
    modules = dict(model.named_modules())
    problems = [f"{name}: no such module" for name in found["also"] if name not in modules]
    for path in found["frozen"]:
        reason = why_not(model, path) if path in modules else "no such module"
        if not reason and isinstance(modules[path], BranchLoraLinear):
            reason = "already has branches"
        if reason:
            problems.append(f"{path}: {reason}")
    if problems:
        raise ValueError(
            "model: expected linear modules at the saved paths, got\n  " + "\n  ".join(problems)
        )
    sequences = Sequences(found["reads"], found["causal"], tuple(found["also"]))
    sequences.bank, sequences.learning = found["bank"], found["learning"]
    sequences.task = len(found["bank"]) - 1 if found["bank"] else None
    layers = {
        path: BranchLoraLinear(modules[path], found["config"], sequences)
        for path in found["frozen"]
    }
    for layer in layers.values():
        for known in found["routers"]:  # branches came in between the routers
            layer.add_branches(max(0, known - len(layer.branches)))
            layer.add_router()
        layer.add_branches(found["branches"] - len(layer.branches))
    return layers
