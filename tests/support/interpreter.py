"""Triton's interpreter for tests: enabled if there is no GPU, made faster, and extended with a sanitizer.

The kernels themselves work around the interpreter's bf16 errors (triton_kernels/numerics.py), so nothing
is fixed here: a fix would hide a kernel that lacks the workaround.
"""

from __future__ import annotations

import contextlib
import os

import numpy as np
import torch


@contextlib.contextmanager
def interpreting():
    """Modules imported inside, triton or kernels, are interpreted permanently.

    The environment variable is removed afterwards, so that subprocesses of tests do not inherit it.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def quicken():
    """Removes repeated work of the interpreter, half of a kernel's time, and fixes the order of row sums.

    The interpreter patches triton.language in every call of a device function, and copies every CPU tensor
    onto itself after a launch, which also allocates lazily mapped memory.
    """
    from triton.runtime import interpreter

    patch, restore = interpreter._patch_lang, interpreter.GridExecutor._restore_args_dev
    run = interpreter.GridExecutor.__call__
    patched = set()

    def patch_once(fn):
        languages = {
            id(v) for v in fn.__globals__.values() if v in (interpreter.tl, interpreter.tl.core)
        }
        if languages <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages)
        return patch(fn)

    def run_patched_anew(self, *args, **kwargs):
        patched.clear()
        try:
            return run(self, *args, **kwargs)
        finally:
            patched.clear()

    def restore_devices(self, args_dev, args_hst, kwargs, kwargs_hst):
        if any(v.device.type != "cpu" for v in tensors(args_dev)):
            restore(self, args_dev, args_hst, kwargs, kwargs_hst)

    dot = interpreter.InterpreterBuilder.create_dot

    def dot_of_rows(self, a, b, *rest):
        """dot with contiguous b, as OpenBLAS sums small tiles of a transposed matrix in another order."""
        return dot(self, a, interpreter.TensorHandle(np.ascontiguousarray(b.data), b.dtype), *rest)

    interpreter.InterpreterBuilder.create_dot = dot_of_rows
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = run_patched_anew
    interpreter.GridExecutor._restore_args_dev = restore_devices


def tensors(args):
    """All tensors among a kernel's arguments, including those in tuples."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from tensors(arg)


class Sanitizer:
    """Inside `with Sanitizer():` a launch raises if a kernel

    reads or writes an element that is in no view among its arguments (including gaps between the rows of a
    slice), writes an element that another program reads or writes, or overflows an int32.

    Masked-off elements of a load without `other` are undefined, and zero in the interpreter; here they are
    NaN, or an integer that is not a valid id or offset.
    """

    def __enter__(self):
        from triton.runtime import interpreter

        self.builder = interpreter.InterpreterBuilder
        self.executor = interpreter.GridExecutor
        self.options = interpreter.interpreter_builder.options
        self.load, self.store = self.builder.create_masked_load, self.builder.create_masked_store
        self.call, self.debug = self.executor.__call__, self.options.debug
        self.launches = 0
        call, load, store = self.call, self.load, self.store
        sanitizer = self

        def checked_call(executor, *args, **kwargs):
            sanitizer.memory = [Storage(views) for views in by_storage(tensors(args))]
            sanitizer.launches += 1
            sanitizer.name = executor.fn.__name__
            return call(executor, *args, **kwargs)

        def checked_load(builder, pointers, mask, other, *rest):
            sanitizer.check(pointers, mask, builder.grid_idx, writes=False)
            other = undefined(pointers) if other is None else other
            return load(builder, pointers, mask, other, *rest)

        def checked_store(builder, pointers, value, mask, *rest):
            sanitizer.check(pointers, mask, builder.grid_idx, writes=True)
            return store(builder, pointers, value, mask, *rest)

        self.executor.__call__ = checked_call
        self.builder.create_masked_load = checked_load
        self.builder.create_masked_store = checked_store
        object.__setattr__(self.options, "debug", True)  # asserts on int32 overflow
        return self

    def __exit__(self, *exception):
        self.executor.__call__ = self.call
        self.builder.create_masked_load, self.builder.create_masked_store = self.load, self.store
        object.__setattr__(self.options, "debug", self.debug)

    def check(self, pointers, mask, program, *, writes):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        if not addresses.size:
            return
        program = 1 + program[0] + 1024 * (program[1] + 1024 * program[2])
        left = addresses
        for storage in self.memory:
            left = storage.check(left, program, writes, self.name)
        if left.size:
            raise AssertionError(f"{self.name}: {left.size} accesses outside of every argument")


def undefined(pointers):
    """A tile of NaN, or of a large odd integer, for masked-off elements; bf16 is stored as bits."""
    from triton.runtime.interpreter import TensorHandle, _get_np_dtype

    element = pointers.get_element_ty()
    kind = _get_np_dtype(element)
    if np.issubdtype(kind, np.floating):
        value = np.nan
    else:
        value = 0x7FC0 if element.is_bf16() else np.iinfo(kind).max // 2
    return TensorHandle(np.full(pointers.data.shape, value, kind), element)


@contextlib.contextmanager
def overflow_checked():
    """Only the sanitizer's int32 check, for memory that is too large to track."""
    from triton.runtime.interpreter import interpreter_builder

    before = interpreter_builder.options.debug
    object.__setattr__(interpreter_builder.options, "debug", True)
    try:
        yield
    finally:
        object.__setattr__(interpreter_builder.options, "debug", before)


class Storage:
    """Memory of some arguments of a kernel: the elements in their views and the programs that use them."""

    MANY = -1

    def __init__(self, views):
        self.itemsize = views[0].element_size()
        self.start = min(v.data_ptr() for v in views)
        size = max((v.data_ptr() - self.start) // self.itemsize + span(v) for v in views)
        held = torch.zeros(size, dtype=torch.bool)
        for v in views:
            first = (v.data_ptr() - self.start) // self.itemsize
            held.as_strided(v.shape, v.stride(), first).fill_(True)
        self.held = held.numpy()
        self.reader, self.writer = np.zeros((2, size), np.int64)

    def check(self, addresses, program, writes, name):
        """Checks the addresses in this storage; returns the others."""
        elements = (addresses - self.start) // self.itemsize
        here = (elements >= 0) & (elements < len(self.held))
        at = elements[here]
        if not at.size:
            return addresses
        if not self.held[at].all():
            raise AssertionError(f"{name}: access between the rows of an argument")
        writer, reader = self.writer[at], self.reader[at]
        if ((writer != 0) & (writer != program)).any():
            raise AssertionError(f"{name}: two programs touch what one of them writes")
        if writes:
            if ((reader != 0) & (reader != program)).any():
                raise AssertionError(f"{name}: a program writes what another has read")
            self.writer[at] = program
        else:
            self.reader[at] = np.where((reader == 0) | (reader == program), program, self.MANY)
        return addresses[~here]


def span(view):
    """Number of elements from a view's first to its last, gaps included."""
    if view.numel() == 0:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(view.shape, view.stride()))


def by_storage(views):
    groups = {}
    for view in views:
        if view.numel():
            groups.setdefault(view.untyped_storage().data_ptr(), []).append(view)
    return groups.values()
