"""Tile sizes by architecture: no spills, within the GPU's shared memory, and no autotuning.

Chosen by inspecting the compiled code (test_triton_compile.py), not by timing.  A tile depends on
shapes, dtype, architecture and the size class of T.  So a new T in the same class never recompiles, and
within a class a token's bits do not depend on its batch.
"""

import functools

import torch
import triton
from triton.runtime.errors import OutOfResources

from .numerics import INTERPRETED

BLOCK_N = 64  # columns of y per step of `rank_dense`
SMALL_T = 64  # up to so many tokens, taller tiles would leave programs idle


class UnsupportedGPU(OutOfResources):
    """Handled like a kernel that does not fit: plain PyTorch is used instead."""

    def __init__(self, arch):
        self.arch = arch

    def __str__(self):
        return (
            f"there are no tiles for {self.arch}, whose waves have 32 threads: of AMD's GPUs the Triton"
            " kernels serve those with 64, gfx90a and later of the Instinct line"
        )


@functools.lru_cache
def family(device):
    """interpreter, hopper, blackwell (227 KB of shared memory a block), ampere and similar (99) or cdna."""
    if INTERPRETED:
        return "interpreter"
    with torch.cuda.device_of(torch.empty(0, device=device)):
        target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        if target.warp_size != 64:  # with the tiles of the others, up to 2,367 registers spill
            raise UnsupportedGPU(target.arch)
        return "cdna"
    return {9: "hopper", 10: "blackwell"}.get(target.arch // 10, "ampere")


def padded(n, most):
    """Columns of a tile for n: a power of two from 16, the minimum of a dot along K, to `most`."""
    return min(most, max(16, triton.next_power_of_2(n)))


def split_of_d(D, ranks, few_tokens):
    """Columns of x per program of `shrink`: by plan and shape, never by T, as sums depend on it."""
    if few_tokens:  # the decode plan
        return 64 if INTERPRETED else 512
    parts = 2 if ranks <= 128 else 1  # more ranks fill a device with programs of their own
    return triton.cdiv(triton.cdiv(D, parts), 64) * 64 or 64


def rank_sizes(x, most):
    """Sizes that a tile of ranks may have in `shrink`, and the most tokens of one."""
    gpu = family(x.device)
    if gpu == "interpreter" or x.itemsize == 4:
        return (most,), 32 if INTERPRETED else 16
    # without asynchronous products, taller tiles spill next to the three terms of the router's W
    most_tokens = {"ampere": 32, "cdna": 64, "hopper": 128, "blackwell": 128}[gpu]
    return tuple(n for n in (16, 32, 64, 128) if n <= most), most_tokens


def shrink(gpu, T, half, width):
    """A tile of T tokens and `width` ranks (grids.py)."""
    tile = {"BLOCK_T": T, "BLOCK_R": width, "BLOCK_D": 64}
    if not half:
        return tile | {"num_warps": 8, "num_stages": 2}
    warps = 8 if T * width > 64 * 64 or width > T else 4
    return tile | {"num_warps": warps}


def token_sizes(x, experts):
    """Sizes that a tile of tokens may have in `rank_dense`; none if `expand` writes y."""
    if x.itemsize == 4 or experts.TILE_E * experts.TILE_R > 128:
        return ()
    if INTERPRETED:
        return (32,)
    # with a table of rows, every element of S needs its own address: half as many tokens fit
    return (64, 128) if experts.offsets is None else (64,)


def rank_dense(gpu, T, half, width):
    """A tile of T tokens (grids.py), if y is written."""
    if not half or width > 128:
        return {"BLOCK_T": 16, "BLOCK_N": BLOCK_N, "num_warps": 4 if width <= 128 else 8}
    return {"BLOCK_T": T, "BLOCK_N": BLOCK_N, "num_warps": 8}


def decode(gpu, T, half, width):
    return {"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_R": max(16, min(width, 64) if half else 16)}


def rank_gradient(gpu, T, half, width):
    return {"BLOCK_T": 16}


def expand(gpu, T, half, width):
    if (
        gpu in ("hopper", "blackwell") and half and T > SMALL_T
    ):  # H and B: from L2 once per tile of the other axis
        return {"BLOCK_T": 128, "BLOCK_D": 128, "num_warps": 8}
    return {"BLOCK_T": 16 if T <= SMALL_T else 64, "BLOCK_D": 64}


def wgrad(gpu, T, half, width):
    if not half:
        return {"BLOCK_T": 16, "BLOCK_D": 64, "MAX_R": 128, "num_warps": 8, "num_stages": 2}
    tile = {"BLOCK_T": 32, "BLOCK_D": 64, "MAX_R": 128, "num_warps": 8}
    if gpu in ("hopper", "blackwell"):  # H: from L2 once per tile of columns
        tile["BLOCK_D"] = 128
    if gpu == "blackwell":  # 32 tokens spill
        tile |= {"BLOCK_T": 64, "num_stages": 2}
        if width > 256:
            tile["BLOCK_D"] = 64
    return tile


def wgrad_many_experts(gpu, T, half, width):
    """The sums of dW take the place of the larger tile."""
    return wgrad("ampere", T, half, width)


def segmented(gpu, T, half, width):
    """A tile of tokens and the rank columns of its experts that a program of `segmented_shrink` handles.

    Few tokens hold few experts, so little is multiplied by zero; one size fits every T.
    """
    tile = {"BLOCK_T": 16, "BLOCK_D": 64 if half else 32, "BLOCK_N": 64, "COLUMNS": max(128, width)}
    stages = 3 if half or gpu == "blackwell" else 2  # there, two spill
    return tile | {"num_warps": 4 if width <= 128 else 8, "num_stages": stages}


def segmented_dx(gpu, T, half, width):
    """The same for dx: a larger tile of tokens reads the router's W and shared rows of A once."""
    tile = segmented(gpu, T, half, width)
    if T <= SMALL_T or not half or width > 128 or gpu == "cdna":
        return tile
    if gpu != "hopper":  # 64 tokens spill
        return tile | {"BLOCK_T": 32}
    return tile | {"BLOCK_T": 64, "BLOCK_N": 128, "num_warps": 8}


def segmented_rank_gradient(gpu, T, half, width):
    """A tile of slots of one expert; they are many if picks are spread over few experts."""
    if half and width <= 128:
        return {"BLOCK_T": 64, "BLOCK_D": 64, "num_warps": 4 if width <= 64 else 8}
    return {"BLOCK_T": 16, "BLOCK_D": 64 if half else 32}


def segmented_wgrad(gpu, T, half, width):
    return {"BLOCK_T": 32 if half else 16, "BLOCK_D": 64}


def router_topk(gpu, T, half, width):
    return {"BLOCK_T": 32 if half else 16, "BLOCK_D": 64, "num_warps": 8}


def route_logits(gpu, T, half, width):
    return {
        "BLOCK_T": max(1, min(16, 4096 // width)),
        "BLOCK_D": 16,
        "num_warps": 4 if width <= 256 else 8,
    }


def router_topk_backward(gpu, T, half, width):
    return {"BLOCK_T": max(1, min(16, 4096 // width)), "num_warps": 4 if width <= 256 else 8}


def gate_ranks(gpu, T, half, width):
    return {"BLOCK_T": max(1, min(16, 4096 // width))}


TILES = {
    tile.__name__: tile
    for tile in (
        shrink,
        rank_dense,
        decode,
        rank_gradient,
        expand,
        wgrad,
        wgrad_many_experts,
        segmented,
        segmented_dx,
        segmented_rank_gradient,
        segmented_wgrad,
        router_topk,
        route_logits,
        router_topk_backward,
        gate_ranks,
    )
}


def interpreted(kernel, T, half, width):
    """A program takes milliseconds whatever its tile; the size classes are small enough for tests."""
    tile = {"BLOCK_T": 32, "BLOCK_D": 64 if half else 32}
    if kernel == "shrink":
        tile["BLOCK_R"] = width
    elif kernel == "decode":
        tile = {"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_R": 128}
    elif kernel.startswith("wgrad"):
        tile["MAX_R"] = 128
    elif kernel in ("segmented", "segmented_dx"):
        tile |= {"BLOCK_T": 16, "BLOCK_N": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 1}
    elif kernel.startswith("rank_dense"):
        tile = {"BLOCK_T": 32, "BLOCK_N": BLOCK_N}
    elif kernel in ("rank_gradient", "router_topk_backward", "gate_ranks"):
        del tile["BLOCK_D"]
    return tile


def sort_window(by):
    """How many items are sorted together; fewer for slots, as one program handles all of an expert's."""
    if INTERPRETED:
        return 256
    return 8192 if by == "slot" else 16384


def choose(kernel, x, width, tokens=None):
    """Launch options of `kernel` for operands like x and `width` columns of ranks or experts.

    `tokens`: of a tile, where grids.py chooses it.
    """
    gpu, T, half = family(x.device), len(x) if tokens is None else tokens, x.itemsize == 2
    if gpu == "interpreter":
        return interpreted(kernel, T, half, width)
    tile = {"num_warps": 4, "num_stages": 3} | TILES[kernel](gpu, T, half, width)
    splits_x = kernel in ("router_topk", "shrink")
    tight = kernel == "wgrad_many_experts" or (kernel == "wgrad" and gpu == "ampere")
    if x.dtype == torch.float16 and tight:
        tile |= {"BLOCK_D": 32, "MAX_R": 64, "num_warps": 4}  # the same holds with dlogits
    elif x.dtype == torch.float16 and splits_x and tile["BLOCK_D"] > 32:
        tile["BLOCK_D"] //= 2  # with the router's fp32 W, an fp16 x is two bf16 terms
        if tile["BLOCK_T"] * tile["BLOCK_D"] < 256 * tile["num_warps"]:
            tile["num_warps"] //= 2  # every thread still loads 128 bits of x
    if gpu == "cdna":  # its warps have 64 threads
        tile |= {"num_warps": tile["num_warps"] // 2, "num_stages": 2}
    return tile
