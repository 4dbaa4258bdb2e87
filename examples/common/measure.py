"""Memory cost of a training step: bytes saved for the backward, and the peak."""

import ctypes
import gc
import platform
import statistics
from pathlib import Path

import torch

from examples.common.training import loss_of

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's numbers for mallopt


def median(values):
    return statistics.median(values)


def saved_bytes(model, batch):
    """Bytes of the storages that autograd saves for the backward, each counted once, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved, alive = {}, []  # alive: otherwise the address of a freed storage could be reused

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, *batch)
    return sum(saved.values())


def saved_bytes_unadapted(model, batch):
    """saved_bytes of the frozen model; its embeddings require grad, or there would be no graph."""
    hook = model.model.embed_tokens.register_forward_hook(lambda *args: args[-1].requires_grad_())
    try:
        return saved_bytes(model, batch)
    finally:
        hook.remove()


def return_memory_at_once():
    """Makes glibc return every large block as soon as it is freed, so that resident memory is memory in use.

    This slows down allocation: call it after the timing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 1 << 16)
        libc.mallopt(TRIM_THRESHOLD, 1 << 16)


def peak_bytes(step, rounds=3):
    """Peak rise of resident memory during `step`, in bytes (median of `rounds`); None if not on Linux."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    rises = []
    for _ in range(rounds):
        before = resident_bytes()
        reset.write_text("5")  # the high-water mark starts again from here
        step()
        rises.append(_status("VmHWM") - before)
    return median(rises)


def resident_bytes():
    """Resident memory after a garbage collection, in bytes; None if not on Linux."""
    if not Path("/proc/self/status").exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(field):
    """The given field of /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024
