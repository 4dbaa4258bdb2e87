"""What a launcher decides: the tile for a part, the padding of experts, the precision of fp32 dots.

Tiles depend on the operands' shapes, dtype and architecture, never on their values, and on T by at most
its size class: a token's bits do not depend on its batch within one.  There is no autotuning.
"""

import functools
from itertools import pairwise
from typing import NamedTuple

import torch
import triton

from .numerics import INTERPRETED
from .tiles import family

SUPPORTED = (torch.float32, torch.float16, torch.bfloat16)


def require_supported(*operands, dtype=None):
    for got in (*(v.dtype for v in operands), *([] if dtype is None else [dtype])):
        if got not in SUPPORTED:
            raise TypeError(f"triton kernels: expected float32, float16 or bfloat16, got {got}")


def require_rank_dense(plan):
    if plan != "rank_dense":
        raise ValueError(f"plan: the Triton kernels run 'rank_dense' only, got {plan!r}")


def column_rows(v):
    """v with unit stride along its columns, copied only if it is not."""
    return v if v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


def padded(n, most):
    """Columns of a tile for n of them: a power of two from 16, which a dot wants along K, to `most`."""
    return min(most, max(16, triton.next_power_of_2(n)))


def launch(x, kernel, grid, *args, **options):
    """Launch on x's own device, which need not be the current one; Triton's default for fusing is
    changing."""
    with torch.cuda.device_of(x):
        kernel[grid](*args, enable_fp_fusion=True, **options)


def precision(x):
    """Of fp32 dots: PyTorch's own switch on NVIDIA; AMD has no TF32."""
    if INTERPRETED or x.dtype != torch.float32 or family(x.device) == "cdna":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


# --- experts ------------------------------------------------------------------------------------


class ExpertTile(NamedTuple):
    """Columns of a tile of ranks: EP experts of RP ranks each, and where their rows are."""

    EP: int
    RP: int
    rank: int  # of every expert, where offsets is None
    offsets: torch.Tensor | None  # (E+1,) int32

    @property
    def width(self):
        return self.EP * self.RP

    @property
    def in_registers(self):
        """Whether S of all experts fits a program's registers beside the sums of a dot."""
        return self.width <= 256

    def chunk(self):
        """How many experts at a time otherwise."""
        return min(self.EP, max(1, 256 // self.RP))


def expert_tile(offsets, device):
    """All experts side by side, at least 16 columns: a dot wants as many along K."""
    ranks = {stop - start for start, stop in pairwise(offsets)}
    EP = triton.next_power_of_2(len(offsets) - 1)
    RP = max(triton.next_power_of_2(max(ranks)), 16 // EP)
    if len(ranks) == 1:
        return ExpertTile(EP, RP, ranks.pop(), None)
    return ExpertTile(EP, RP, 0, _offsets_on(tuple(offsets), device))


@functools.lru_cache(maxsize=256)
def _offsets_on(offsets, device):
    return torch.tensor(offsets, dtype=torch.int32, device=device)
