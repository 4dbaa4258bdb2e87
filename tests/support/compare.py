"""Accuracy checks: errors against fp64, compared with the error of plain PyTorch in the same dtype.

A result passes if its relative Frobenius error is at most `factor` times eager PyTorch's, or below
a floor of a few units in the last place (on small shapes eager may be exact by chance).
"""

from __future__ import annotations

import torch

UNIT = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
# In units.  H and y rounded once each err by 0.6 u on average; over a few dozen numbers, chance decides
# which of two such results is closer, and where sums have few terms eager may be exact by luck.
FLOOR = {torch.bfloat16: 0.8, torch.float16: 0.8, torch.float32: 4.0}


def relative_error(out, truth) -> float:
    """||out - truth||_F / ||truth||_F, infinite for a NaN, None or another shape."""
    if out is None or out.shape != truth.shape:
        return float("inf")
    difference = (out.detach().double() - truth.detach().double()).norm()
    scale = truth.detach().double().norm()
    error = float(difference / scale) if scale > 0 else float(difference)
    return error if error == error else float("inf")


def assert_accurate(name, out, truth, eager=None, *, dtype=None, factor=None, units=None):
    """Raise AssertionError unless `out` is as accurate as its dtype and eager's result demand.

    fp64: 1e-13.  fp32: 1.25 times eager.  bf16, fp16: 1.0 times eager (`factor` to override).
    `units` bounds the error in units in the last place instead of, or besides, eager.
    `dtype` is the precision of the computation where `out` is kept wider.
    """
    if truth.numel() == 0:
        assert out.shape == truth.shape, f"{name}: shape {tuple(out.shape)}"
        return
    dtype = dtype or out.dtype
    error = relative_error(out, truth)
    if dtype == torch.float64:
        limit = 1e-13
    else:
        factor = factor or (1.25 if dtype == torch.float32 else 1.0)
        limits = []
        if eager is not None:
            limits.append(max(factor * relative_error(eager, truth), FLOOR[dtype] * UNIT[dtype]))
        if units is not None:
            limits.append(units * UNIT[dtype])
        limit = min(limits)
    assert error <= limit, (
        f"{name}: relative error {error:.3g} = {error / UNIT[dtype]:.2f} u of {dtype},"
        f" limit {limit:.3g} = {limit / UNIT[dtype]:.2f} u"
    )
