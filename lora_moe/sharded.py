"""Models that are wrapped or spread over processes: their plain names, whole tensors, and who writes.

FSDP2's parameters are DTensors, ZeRO-3's are empty outside of their layer; both are made whole in a
collective that every process takes part in.  Everything else is a plain tensor, and no process waits.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

# names that wrappers put into the middle of a path
_SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without PEFT, DDP, DataParallel, FSDP, DeepSpeed's engine and torch.compile around it."""
    while True:
        kind = type(model).__name__
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif kind in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine"):
            model = model.module
        elif hasattr(model, "_fsdp_wrapped_module"):
            model = model._fsdp_wrapped_module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()  # PeftModel, whose layers stay in it
        else:
            return model


def plain_path(path: str) -> str:
    """The path without what wrappers put into it."""
    return ".".join(name for name in path.split(".") if name not in _SEGMENTS)


def whole_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{plain path: the module that trains} of what PEFT trains as a whole, beside the base's own."""
    found = {}
    for path, module in model.named_modules():
        if any(c.__name__ == "ModulesToSaveWrapper" for c in type(module).__mro__):
            active = [n for n in module.active_adapters if n in module.modules_to_save]
            found |= {plain_path(path): module.modules_to_save[name] for name in active}
    return found


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """{plain path: module}; for what PEFT trains as a whole, the module that trains."""
    modules = {plain_path(path): module for path, module in model.named_modules()}
    return modules | whole_modules(model)


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id")


def is_writer() -> bool:
    """Whether this process writes files: the only one, or rank 0."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


@torch.no_grad()
def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{name: the whole tensor, contiguous and with memory of its own}; a collective where one is sharded."""
    whole, seen = {}, set()
    for name, tensor in tensors.items():
        with _whole(tensor):
            value = tensor.full_tensor() if hasattr(tensor, "device_mesh") else tensor
            value = value.detach().contiguous()
            if hasattr(tensor, "ds_id") or value.untyped_storage().data_ptr() in seen:
                value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        whole[name] = value
    return whole


@torch.no_grad()
def fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole value into a parameter or buffer, of which this process may hold a part."""
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(device=tensor.device, dtype=tensor.dtype)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    with _whole(tensor, modified=True):
        tensor.copy_(value)


def _whole(tensor, modified=False):
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if modified else None)
