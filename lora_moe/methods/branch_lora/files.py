"""The complete continual state in one safetensors file, to continue in the middle of a task.

    branch_lora.safetensors
        tensors   <module path>.{lora_A, branches.<j>, routers.<i>, usage}, <name> of other parameters,
                  selector.{text_keys, image_keys}
        metadata  {"format": "pt", "branch_lora": JSON of the configuration, tasks and frozen branches}

The file is untrusted, as in lora_moe.io: keys, shapes and dtypes must match the model, which is changed only
after all checks.  The optimizer's state is saved by the trainer.
"""

from __future__ import annotations

import dataclasses
import os
from reprlib import repr as brief

import torch
from torch import nn

from ... import safefile
from ...config import LoraMoeConfig
from ...injection import settle
from ...layers import LoraMoeLinear
from ...linear import linear_features
from ...reference import accumulator
from ...routers import PerTaskRouter
from ...targets import why_not
from ...tensors import adapter_tensors
from .adapters import ROUTE_BY, branches_of, router_of, routers_of, state_of, tell
from .continual import TaskSelector
from .counting import Count, Course

FILE_NAME = "branch_lora.safetensors"
FORMAT_VERSION = 1
_SELECTOR = ("selector.text_keys", "selector.image_keys")
_FIELDS = {
    "version": int, "config": dict, "reads": str, "causal": bool, "also": list, "bank": list,
    "learning": bool, "branches": int, "routers": list, "frozen": dict,
}  # fmt: skip


def save(model: nn.Module, directory: str | os.PathLike, selector: TaskSelector | None = None):
    """Write branches, routers, usage, other trainable parameters and the selector's keys, atomically.

    Returns:
        The file's path.
    Raises:
        ValueError: if the model has no branches.
        OSError: if the file cannot be written; an existing one is unchanged.
    """
    layers, course = state_of(model)
    layer = next(iter(layers.values()))
    description = {
        "version": FORMAT_VERSION,
        "config": _fields_of(layer.config),
        "reads": course.route_by,
        "causal": bool(getattr(model, "can_generate", bool)()),
        "also": list(course.modules_to_save),
        "bank": course.bank,
        "learning": course.learning,
        "branches": layer.config.num_experts,
        "routers": [router.shape[0] for router in routers_of(layer)],
        "frozen": {path: list(layer.frozen) for path, layer in layers.items()},
    }
    tensors = _keyed(model, layers, course.modules_to_save) | _keys(selector)
    path = safefile.path_in(directory, FILE_NAME)
    safefile.write_described(path, tensors, "branch_lora", description)
    return path


def load(model: nn.Module, directory: str | os.PathLike) -> TaskSelector | None:
    """Load a saved state into a model without branches, to continue training.

    The last task's router is used; see set_task.

    Returns:
        The selector, or None if none was saved.
    Raises:
        ValueError: if the file is not ours, is damaged, does not fit the model (every mismatch is
            listed), or has NaN or infinite values.  The model is unchanged.
        OSError: if the file is missing or cannot be read.
    """
    with safefile.open_in(directory, FILE_NAME) as file:
        found, slices = safefile.read_described(file, "branch_lora", [FORMAT_VERSION])
        _check(file.name, found, len(slices))
        bases, also = _modules(model, found)
        _expect_count(file.name, found, also, slices)
        wanted = _wanted(bases, found) | also | _wanted_keys(slices)
        values = safefile.read_tensors(file, slices, wanted)
    course = Course(found["reads"], tuple(found["also"]))
    course.bank, course.learning = found["bank"], found["learning"]
    layers = {path: _layer(path, base, found, course, values) for path, base in bases.items()}
    selector = _selector(values)
    settle(model, layers.values())
    for name in course.modules_to_save:
        model.get_submodule(name).requires_grad_(True)
    with torch.no_grad():
        for key, parameter in also.items():
            parameter.copy_(values.pop(key))
    if course.bank:
        course.task = len(course.bank) - 1
        tell(model, course)
    return selector


def _fields_of(config):
    """The configuration at the time of the first router, as the file format requires."""
    router = config.router if isinstance(config.router, PerTaskRouter) else config.router.inner
    fewest = min(router.experts_of(config), default=config.num_experts)
    plain = dataclasses.replace(config, router=None, num_experts=fewest, r=config.ranks[0])
    return {k: v for k, v in plain.to_dict().items() if k not in ("router", "middle")}


def _keyed(model, layers, also):
    """{key: tensor} of the layers and the other trained modules."""
    tensors = {f"{p}.{n}": t for p, layer in layers.items() for n, t in _tensors_of(layer).items()}
    for module in also:
        tensors |= {f"{module}.{n}": p for n, p in model.get_submodule(module).named_parameters()}
    return tensors


def _tensors_of(layer):
    """{name: tensor} of a layer, with separate branches and routers."""
    tensors = {"lora_A": layer.lora_A, "usage": layer.usage.float()}
    tensors |= {f"branches.{j}": rows for j, rows in enumerate(branches_of(layer))}
    return tensors | {f"routers.{i}": router for i, router in enumerate(routers_of(layer))}


def _keys(selector):
    return {} if selector is None else {f"selector.{n}": t for n, t in selector.named_buffers()}


def _check(name, found, tensors):
    """Raise unless the description is a valid state; converts its config to a LoraMoeConfig."""
    fits = found.keys() == _FIELDS.keys()
    if not fits or any(type(found[field]) is not kind for field, kind in _FIELDS.items()):
        raise ValueError(f"{name}: expected the fields {list(_FIELDS)}, got {brief(found)}")
    found["config"] = LoraMoeConfig.from_dict(found["config"])
    branches, routers, bank = found["branches"], found["routers"], found["bank"]
    fewest = found["config"].num_experts
    problems = [
        ("reads", found["reads"] in ROUTE_BY),
        ("also", all(type(module) is str for module in found["also"])),
        ("branches", fewest <= branches <= tensors),
        ("routers", len(routers) <= tensors and _numbers(routers, fewest, branches + 1)),
        ("routers", routers == sorted(routers)),  # branches were added between routers
        ("bank", len(bank) >= len(routers) and _numbers(bank, 0, len(routers))),
        ("learning", bool(bank) or not found["learning"]),
        ("frozen", all(_ids(ids, branches) for ids in found["frozen"].values())),
    ]
    wrong = {field: found[field] for field, right in problems if not right}
    if wrong or not found["frozen"]:
        raise ValueError(f"{name}: expected a consistent state, got {brief(wrong)}")


def _numbers(values, low, high):
    return all(type(n) is int and low <= n < high for n in values)


def _ids(values, high):
    return (
        isinstance(values, list) and _numbers(values, 0, high) and len(set(values)) == len(values)
    )


def _modules(model, found):
    """{path: linear module} of the layers, and {key: parameter} of the other trained modules."""
    modules = dict(model.named_modules())
    problems = [f"{name}: no such module" for name in found["also"] if name not in modules]
    for path in found["frozen"]:
        reason = why_not(model, path) if path in modules else "no such module"
        if not reason and isinstance(modules[path], LoraMoeLinear):
            reason = "already has branches"
        if reason:
            problems.append(f"{path}: {reason}")
    safefile.raise_all("model: expected linear modules at the saved paths", problems)
    also = {f"{m}.{n}": p for m in found["also"] for n, p in modules[m].named_parameters()}
    return {path: modules[path] for path in found["frozen"]}, also


def _expect_count(name, found, also, slices):
    """Check the number of tensors first, so that a small file cannot cause a long list of problems."""
    layer = 2 + found["branches"] + len(found["routers"])  # lora_A and usage
    keys = sum(key in slices for key in _SELECTOR)
    expected = len(found["frozen"]) * layer + len(also) + keys
    if expected > len(slices) + 1000:  # smaller differences are listed one by one
        raise ValueError(f"{name}: expected {expected} tensors, got {len(slices)}")


def _wanted(bases, found):
    """The layers' tensors on meta, so nothing is allocated before the file is checked."""
    config, wanted = found["config"], {}
    for path, base in bases.items():
        trunk = adapter_tensors(base, config)["lora_A"]  # (r, D_in)
        D_in, D_out = linear_features(base)
        wanted[f"{path}.lora_A"] = trunk
        wanted[f"{path}.usage"] = trunk.new_empty(found["branches"], dtype=torch.float32)
        branch = trunk.new_empty(trunk.shape[0], D_out)
        wanted |= dict.fromkeys((f"{path}.branches.{j}" for j in range(found["branches"])), branch)
        for i, known in enumerate(found["routers"]):
            router = torch.empty(known, D_in, dtype=accumulator(trunk.dtype), device="meta")
            wanted[f"{path}.routers.{i}"] = router
    return wanted


def _wanted_keys(slices):
    """The selector's tensors in the saved sizes, if there are any."""
    shapes = {key: slices[key].shape for key in _SELECTOR if key in slices}
    if shapes and _SELECTOR[0] not in shapes:
        raise ValueError(f"{_SELECTOR[0]}: missing")
    fit = all(len(shape) == 2 and shape[1] for shape in shapes.values())
    if not fit or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"selector: expected (tasks, width) for all of its keys, got {shapes}")
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _layer(path, base, found, course, values):
    """A layer with the file's values, not in the model yet."""
    known, branches = tuple(found["routers"]), found["branches"]
    router = router_of(found["reads"], len(known), known)
    config = dataclasses.replace(found["config"], num_experts=branches, router=router)
    layer = LoraMoeLinear(base, config)
    Count.attach(layer, course)
    with torch.no_grad():
        for name, tensor in _tensors_of(layer).items():
            tensor.copy_(values.pop(f"{path}.{name}"))
    for i, router in enumerate(routers_of(layer)):
        router.requires_grad_(found["learning"] and i == found["bank"][-1])
    layer.frozen = found["frozen"][path]
    return layer


def _selector(values):
    keys = {key: values.pop(key) for key in _SELECTOR if key in values}
    if not keys:
        return None
    selector = TaskSelector(*(tensor.shape[1] for tensor in keys.values()))
    for key, tensor in keys.items():
        setattr(selector, key.removeprefix("selector."), tensor)
    return selector
