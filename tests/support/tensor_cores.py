"""A model of tensor cores for the interpreter: products of 16-bit terms whose sums are truncated.

An MMA instruction adds its products to the accumulator exactly and drops what does not fit into 24 bits, so
a long sum loses up to one unit per step, always toward zero.  `modeled` makes the interpreted kernels
multiply fp32 and 16-bit operands like the compiled ones, term by term, with such an accumulator.
"""

from __future__ import annotations

import numpy as np
import pytest

K_STEP = 16  # of an MMA instruction with 16-bit operands


def truncated(exact):
    """fp64 rounded toward zero to fp32."""
    nearest = exact.astype(np.float32)
    inward = np.nextafter(nearest, np.float32(0))
    return np.where(np.abs(nearest.astype(np.float64)) > np.abs(exact), inward, nearest)


def multiply(a, b, acc):
    """acc + a @ b as computed by MMA instructions."""
    for k in range(0, a.shape[1], K_STEP):
        products = a[:, k : k + K_STEP].astype(np.float64) @ b[k : k + K_STEP].astype(np.float64)
        acc = truncated(acc.astype(np.float64) + products)
    return acc


def modeled(monkeypatch, numerics):
    """Patches the interpreter and `numerics`, the module of the interpreted kernels."""
    triton = pytest.importorskip("triton")
    from triton.runtime import interpreter

    def create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
        return interpreter.TensorHandle(multiply(a.data, b.data, d.data), d.dtype.scalar)

    monkeypatch.setattr(numerics, "SPLIT", triton.language.constexpr(True))
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
