"""Support for wrapped and sharded models: unwrapping, gathering full tensors, choosing the writer.

FSDP2's parameters are DTensors, ZeRO-3's are empty outside of their layer, FSDP1's are parts of a flat one;
gathering them is a collective of all processes that have a shard.  Other tensors are plain, and no process
waits.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

Key = TypeVar("Key", bound=Hashable)
# path segments that wrappers insert
_SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


# --- wrappers --------------------------------------------------------------------------------------


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without PEFT, DDP, DataParallel, FSDP, DeepSpeed's engine, AveragedModel, torch.compile."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "_fsdp_wrapped_module"):
            model = model._fsdp_wrapped_module
        elif _synchronizes(model) or isinstance(model, (nn.DataParallel, AveragedModel)):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()  # PeftModel, whose layers stay in it
        else:
            return model


def _synchronizes(model):
    """Whether it is DDP or DeepSpeed's engine, which only sync parameters that exist when they wrap."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    return bool(kinds & {"DistributedDataParallel", "DeepSpeedEngine"})


def expect_no_wrapper(model: nn.Module) -> None:
    """Raise ValueError if a wrapper would not synchronize experts that are added now."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    kind = type(model).__name__ if _synchronizes(model) else None
    if kind is None and any(map(is_stepped_by_zero, model.parameters())):
        kind = "a model passed to deepspeed.initialize"
    if kind is not None:
        raise ValueError(
            f"model: expected an unwrapped model, got {kind}, which would not synchronize experts that"
            " are added now: inject or load_adapter first, then wrap it"
        )


def plain_path(path: str) -> str:
    """The path without the segments that wrappers insert."""
    return ".".join(name for name in path.split(".") if name not in _SEGMENTS)


def whole_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{plain path: trainable copy} of the modules in PEFT's modules_to_save."""
    found = {}
    for path, module in model.named_modules():
        if any(c.__name__ == "ModulesToSaveWrapper" for c in type(module).__mro__):
            active = [n for n in module.active_adapters if n in module.modules_to_save]
            found |= {plain_path(path): module.modules_to_save[name] for name in active}
    return found


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """{plain path: module}; for PEFT's modules_to_save the trainable copy."""
    modules = {plain_path(path): module for path, module in model.named_modules()}
    return modules | whole_modules(model)


# --- processes -------------------------------------------------------------------------------------


def is_stepped_by_zero(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO steps a flat copy of the parameter."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")


def is_sharded(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id")


def is_collective(model: nn.Module, tensors: Iterable[torch.Tensor]) -> bool:
    """Whether gathering these tensors of the model needs every process."""
    return any(map(is_sharded, tensors)) or any(map(_is_fsdp1, model.modules()))


def is_writer(tensors: Iterable[torch.Tensor] = ()) -> bool:
    """Whether this process writes files: the only one, rank 0, or the first of the shards' mesh."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    mesh = _mesh(tensors)
    return dist.get_rank() == 0 if mesh is None else not any(mesh.get_coordinate())


def conclude(tensors: Iterable[torch.Tensor], error: Exception | None) -> None:
    """End a collective: wait for the writer, and raise on every rank if it failed."""
    mesh = _mesh(tensors)
    groups = [None] if mesh is None else [mesh.get_group(d) for d in range(mesh.ndim)]
    told = [None if error is None else f"{type(error).__name__}: {error}"]
    for group in groups:
        dist.broadcast_object_list(told, group_src=0, group=group)
    if error is not None:
        raise error
    if told[0] is not None:
        raise RuntimeError(f"the writing process raised {told[0]}")


def write_whole(
    model: nn.Module,
    tensors: dict[Key, torch.Tensor],
    write: Callable[[dict[Key, torch.Tensor]], None],
) -> None:
    """Call write(full tensors) on the writing process; in a collective the others wait.

    Raises:
        Exception: what `write` raises, on the writing process.
        RuntimeError: with the same message, on the other processes of a collective.
    """
    own = tensors.values()
    writes, collective, error = is_writer(own), is_collective(model, own), None
    whole = gathered(tensors, keep=writes)
    try:
        if writes:
            write(whole)
    except Exception as raised:
        if not collective:
            raise
        error = raised
    if collective:
        conclude(own, error)


def _mesh(tensors):
    return next((t.device_mesh for t in tensors if hasattr(t, "device_mesh")), None)


# --- full tensors ----------------------------------------------------------------------------------


def reshard(model: nn.Module) -> None:
    """Reshard FSDP2's parameters, so that they are the ones that the optimizer steps.

    After a forward without a backward some are gathered copies, and writes to these would be lost.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if not imported, no module is of its classes
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


@contextlib.contextmanager
def at_rest(model: nn.Module, modified: bool = False):
    """Inside the block, parameters are the ones that the optimizer steps; FSDP1's are gathered."""
    reshard(model)
    with contextlib.ExitStack() as stack:
        if any(map(_is_fsdp1, model.modules())):
            from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

            stack.enter_context(FSDP.summon_full_params(model, writeback=modified))
        yield


def _is_fsdp1(module):
    return hasattr(module, "_fsdp_wrapped_module")


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The full shape; ZeRO-3's parameters have shape (0,) outside of their layer."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@torch.no_grad()
def gathered(tensors: dict[Hashable, torch.Tensor], keep: bool = True) -> dict:
    """{name: full tensor, contiguous and with its own memory}; a collective if one is sharded.

    With keep=False, a process only takes part in the collective.
    """
    whole, seen = {}, set()
    for name, tensor in tensors.items():
        with _whole(tensor):
            value = tensor.detach()
            if hasattr(tensor, "device_mesh"):  # move an offloaded one to its mesh's device
                value = value.to(tensor.device_mesh.device_type).full_tensor().cpu()
            if not keep:
                continue
            value = value.contiguous()
            storage = value.untyped_storage()
            part = storage.nbytes() != value.nbytes  # of a flat parameter
            if part or hasattr(tensor, "ds_id") or storage.data_ptr() in seen:
                value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        whole[name] = value
    return whole


def whole_state(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The state dict with full tensors, where tied ones stay tied; a collective as in gathered()."""
    state = model.state_dict(keep_vars=True)
    whole = gathered({id(t): t for t in state.values()}, keep)
    return {name: whole[id(t)] for name, t in state.items()} if keep else {}


@torch.no_grad()
def fill(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a full value into a parameter or buffer, which may be sharded."""
    if hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(device=tensor.device, dtype=tensor.dtype)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    with _whole(tensor, modified=True):
        tensor.copy_(value)
    if is_stepped_by_zero(tensor) and tensor.requires_grad:
        _fill_master(tensor, value)


def _fill_master(tensor, value):
    """Update ZeRO's fp32 copy, whose old values its optimizer would otherwise restore."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(tensor, "ds_id"):
        safe_set_local_fp32_param(tensor, tensor.ds_tensor.float())
    else:
        safe_set_full_fp32_param(tensor, value.to(tensor.device, torch.float32))


def _whole(tensor, modified=False):
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if modified else None)
