"""What every launcher does: check dtypes, pick the precision of fp32 dots, bundle the experts, launch.

Letters: E experts, R rank rows of all experts, r one expert's rank.
"""

import functools
import os
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
from triton.runtime.errors import OutOfResources

from .numerics import INTERPRETED
from .tiles import family

AUTOTUNE = os.environ.get("LORA_MOE_AUTOTUNE") == "1"
SUPPORTED = (torch.float32, torch.float16, torch.bfloat16)


def require_supported(*operands, dtype=None):
    for got in (*(v.dtype for v in operands), *([] if dtype is None else [dtype])):
        if got not in SUPPORTED:
            raise TypeError(f"triton kernels: expected float32, float16 or bfloat16, got {got}")


def column_rows(v):
    """v with unit stride along its columns, copied only if it is not."""
    return v if v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


def padded(n, most):
    """Columns of a tile for n of them: a power of two from 16, which a dot wants along K, to `most`."""
    return min(most, max(16, triton.next_power_of_2(n)))


def launch(x, kernel, grid, *args, **options):
    """Launch on x's own device, which need not be the current one.

    A tile that the part has no room for is tried once more without the pipeline's buffers.
    """
    options["enable_fp_fusion"] = True  # a default that is changing
    with torch.cuda.device_of(x):
        if AUTOTUNE and not INTERPRETED:
            tile = {k: v for k, v in options.items() if k not in ("num_warps", "num_stages")}
            tuned(kernel)[grid](*args, **tile)
            return
        try:
            kernel[grid](*args, **options)
        except OutOfResources:
            kernel[grid](*args, **options | {"num_stages": 1})


@functools.cache
def tuned(kernel):
    """The kernel with the number of warps and stages that its first call finds fastest.

    Timed anew for other sizes of the layer, dtypes and tiles, never for another T.  The tiles themselves
    stay, as buffers and the order of sums hang on them: tuning changes no bit of a result.
    """
    sizes = [name for name in ("D", "D_in", "D_out", "R", "E") if name in kernel.arg_names]
    tiles = [name for name in kernel.arg_names if name.startswith("BLOCK") or name in ("EP", "RP")]
    configs = [triton.Config({}, num_warps=w, num_stages=s) for w in (2, 4, 8) for s in (1, 2, 3)]
    return triton.autotune(configs, key=sizes + tiles)(kernel)


def precision(x):
    """Of fp32 dots: PyTorch's own switch on NVIDIA; AMD has no TF32."""
    if INTERPRETED or x.dtype != torch.float32 or family(x.device) == "cdna":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


class Experts(NamedTuple):
    """The experts and how a tile of ranks holds them: EP experts of RP columns each, powers of two."""

    a: torch.Tensor | None  # (R, D_in), or (r, D_in) shared
    b: torch.Tensor  # (R, D_out)
    scaling: torch.Tensor  # (E,)
    offsets: torch.Tensor | None  # (E+1,) int32, or None: every expert has `rank` rows
    rank: int
    EP: int
    RP: int
    shared_a: bool
    ranks: tuple[int, ...]

    @property
    def largest(self):
        return max(self.ranks)

    @property
    def own_columns(self):
        """Columns of an expert in a tile of the segmented plan: no dot takes those of two experts together.

        So in which order a token's experts are summed does not depend on who else is in the tile.
        """
        return max(16, self.RP)

    @property
    def fit_registers(self):
        """Whether S of all experts fits beside the sums of a dot; if not, they go a few at a time."""
        return self.EP * self.RP <= 256

    @property
    def options(self):
        EP = self.EP if self.fit_registers else max(1, 256 // self.RP)
        return {"SHARED": self.shared_a, "EP": EP, "RP": self.RP}


def bundle_experts(a, b, scaling, offsets, shared_a):
    """At least 16 columns: a dot wants as many along K."""
    ranks = tuple(stop - start for start, stop in pairwise(offsets))
    EP = triton.next_power_of_2(len(offsets) - 1)
    RP = max(triton.next_power_of_2(max(ranks)), 16 // EP)
    equal = len(set(ranks)) == 1
    return Experts(
        None if a is None else column_rows(a),
        column_rows(b),
        scaling,
        None if equal else table_on(tuple(offsets), b.device),
        max(ranks) if equal else 0,
        EP,
        RP,
        shared_a,
        ranks,
    )


@functools.lru_cache(maxsize=256)
def table_on(numbers, device):
    """The same table for every call: a copy to the device would be a synchronisation each time."""
    return torch.tensor(numbers, dtype=torch.int32, device=device)
