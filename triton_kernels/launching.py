"""Launching kernels: the operands' device, optional tuning, and the precision of fp32."""

import functools
import os

import torch
import triton
from triton.runtime.errors import OutOfResources

from .numerics import INTERPRETED
from .tiles import family

AUTOTUNE = os.environ.get("LORA_MOE_AUTOTUNE") == "1"


def launch(x, kernel, grid, *args, **options):
    """Launch on x's own device, which need not be the current one.

    A tile that does not fit into shared memory is retried once without the pipeline's buffers.
    """
    options["enable_fp_fusion"] = True  # a default that is changing
    with torch.cuda.device_of(x):
        if AUTOTUNE and not INTERPRETED:
            tile = {k: v for k, v in options.items() if k not in ("num_warps", "num_stages")}
            tuned(kernel, options.get("num_warps", 4))[grid](*args, **tile)
            return
        try:
            kernel[grid](*args, **options)
        except OutOfResources:
            kernel[grid](*args, **options | {"num_stages": 1})


@functools.cache
def tuned(kernel, warps):
    """The kernel with the number of pipeline stages that was fastest in its first call.

    Timed again for each layer size, dtype and tile, never for a new T.  Tiles and warps are not tuned:
    buffers and the order of sums depend on them (a sum along a row adds up each warp's share).  So tuning
    changes no bit of a result.
    """
    sizes = [name for name in ("D", "D_in", "D_out", "R", "E") if name in kernel.arg_names]
    tiles = [name for name in kernel.arg_names if name.startswith(("BLOCK", "TILE_"))]
    configs = [triton.Config({}, num_warps=warps, num_stages=stages) for stages in (1, 2, 3, 4)]
    return triton.autotune(configs, key=sizes + tiles)(kernel)


def precision(x):
    """Precision of fp32 dots: PyTorch's own setting on NVIDIA; AMD has no TF32."""
    if INTERPRETED or x.dtype != torch.float32 or family(x.device) == "cdna":
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # newer versions of torch have two settings; reading the older one raises once the newer one is set
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"
