"""Tile sizes by architecture: no spills, within the part's shared memory, and no autotuning.

Chosen by inspecting the compiled code (test_triton_compile.py), not by timing.  A tile depends on
shapes, dtype, architecture and the size class of T.  So a new T in the same class never recompiles, and
within a class a token's bits do not depend on its batch.
"""

import functools

import torch
import triton
from triton.runtime.errors import OutOfResources

from .numerics import INTERPRETED

ALL = 2**30
FEW, SOME = 64, 4096  # up to these sizes T alone does not fill a device: `shrink` splits D


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
    """interpreter, hopper (227 KB of shared memory per block), ampere and similar (99) or cdna (64)."""
    if INTERPRETED:
        return "interpreter"
    with torch.cuda.device_of(torch.empty(0, device=device)):
        target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        if target.warp_size != 64:  # with the tiles of the others, up to 2,367 registers spill
            raise UnsupportedGPU(target.arch)
        return "cdna"
    return "hopper" if target.arch // 10 in (9, 10) else "ampere"


def shrink(part, T, half, width):
    stretch = {"STRETCH": 512} if T <= FEW else {"STRETCH": 1024} if T <= SOME else {}
    if T <= FEW and half:
        return {"BLOCK_T": 32, "BLOCK_D": 64, "num_warps": 8 if width > 16 else 4, **stretch}
    if not half:
        return {"BLOCK_T": 16, "BLOCK_D": 64, "num_warps": 8, "num_stages": 2, **stretch}
    if part == "ampere":
        return {"BLOCK_T": 32, "BLOCK_D": 64, "num_warps": 8 if width > 16 else 4, **stretch}
    return {"BLOCK_T": 64, "BLOCK_D": 64, **stretch}


def routed_lora(part, T, half, width):
    """STRETCH: columns of y that a program writes, at most all of them; None: `expand` writes y."""
    if T <= SOME or (part == "ampere" and width > 128):
        stretch = 512 if half and T <= SOME else None
        tile = {"BLOCK_T": 16, "BLOCK_D": 32, "BLOCK_N": 32, "IN_PARTS": True, "STRETCH": stretch}
        return tile | {"num_warps": 4 if width <= 128 else 8}
    tile = {"BLOCK_N": 64, "IN_PARTS": False, "num_warps": 8}
    if half:
        stretch = ALL if width <= 128 and part != "ampere" else None
        return tile | {"BLOCK_T": 64, "BLOCK_D": 32 if part == "ampere" else 64, "STRETCH": stretch}
    return tile | {"BLOCK_T": 32 if width <= 128 else 16, "BLOCK_D": 32, "STRETCH": None}


def routed_lora_many_experts(part, T, half, width):
    """Their logits and gates leave no room for an S of more than 128 ranks."""
    return routed_lora(part, SOME if width > 128 else T, half, width)


def routed_lora_shared(part, T, half, width):
    """A has so few rows that loading whole rows takes a longer step."""
    tile = routed_lora(part, T, half, width)
    return tile | {"BLOCK_D": 128 if half else 64}


def decode(part, T, half, width):
    return {"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_R": max(16, min(width, 64) if half else 16)}


def rank_gradient(part, T, half, width):
    if T <= SOME:
        return {"BLOCK_T": 16, "BLOCK_D": 32, "IN_PARTS": True}
    rows = 16 if not half else 32 if part == "ampere" or width > 128 else 64
    tile = {"BLOCK_T": rows, "BLOCK_D": 64, "IN_PARTS": False, "num_warps": 8}
    return tile | {"num_stages": 3 if half else 2}


def rank_gradient_unequal(part, T, half, width):
    """With a table of rows, every element of S needs its own address: half as many tokens fit."""
    tile = rank_gradient(part, T, half, width)
    return tile | {"BLOCK_T": min(tile["BLOCK_T"], 32), "BLOCK_D": 64}


def expand(part, T, half, width):
    if part == "hopper" and half and T > FEW:  # H and B: from L2 once per tile of the other axis
        return {"BLOCK_T": 128, "BLOCK_D": 128, "num_warps": 8}
    return {"BLOCK_T": 16 if T <= FEW else 64, "BLOCK_D": 64}


def gram(part, T, half, width):
    if not half:
        return {"BLOCK_T": 16, "BLOCK_D": 64, "MAX_R": 128, "num_warps": 8, "num_stages": 2}
    narrow = {"num_warps": 4, "num_stages": 2}  # with three stages it spills on sm_100
    return {"BLOCK_T": 32, "BLOCK_D": 64, "MAX_R": 128} | (
        {"num_warps": 8} if width > 16 else narrow
    )


def gram_many_experts(part, T, half, width):
    return gram(part, T, half, width)


def segmented(part, T, half, width):
    """A tile of tokens and the rank columns of its experts that a program of `segmented_shrink` handles.

    Few tokens hold few experts, so little is multiplied by zero; one size fits every T.
    """
    tile = {"BLOCK_T": 16, "BLOCK_D": 64 if half else 32, "BLOCK_N": 64, "COLUMNS": max(128, width)}
    return tile | {"num_warps": 4 if width <= 128 else 8, "num_stages": 3 if half else 2}


def segmented_gram(part, T, half, width):
    return {"BLOCK_T": 32 if half else 16, "BLOCK_D": 64}


def router_topk(part, T, half, width):
    return {"BLOCK_T": 32 if half else 16, "BLOCK_D": 64, "num_warps": 8}


def route_logits(part, T, half, width):
    return {
        "BLOCK_T": max(1, min(16, 4096 // width)),
        "BLOCK_D": 16,
        "num_warps": 4 if width <= 256 else 8,
    }


def router_topk_backward(part, T, half, width):
    return {"BLOCK_T": max(1, min(16, 4096 // width)), "num_warps": 4 if width <= 256 else 8}


def gate_ranks(part, T, half, width):
    return {"BLOCK_T": max(1, min(16, 4096 // width))}


TILES = {
    tile.__name__: tile
    for tile in (
        shrink,
        routed_lora,
        routed_lora_many_experts,
        routed_lora_shared,
        decode,
        rank_gradient,
        rank_gradient_unequal,
        expand,
        gram,
        gram_many_experts,
        segmented,
        segmented_gram,
        router_topk,
        route_logits,
        router_topk_backward,
        gate_ranks,
    )
}


def interpreted(kernel, T, half):
    """A program takes milliseconds whatever its tile; the size classes are small enough for tests."""
    few, some = T <= 16, T <= 64
    tile = {"BLOCK_T": 32, "BLOCK_D": 64 if half else 32}
    if kernel == "shrink" and few:
        tile["STRETCH"] = tile["BLOCK_D"]
    elif kernel == "decode":
        tile = {"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_R": 128}
    elif kernel.startswith("gram"):
        tile["MAX_R"] = 128
    elif kernel == "segmented":
        tile |= {"BLOCK_T": 16, "BLOCK_N": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 1}
    elif kernel.startswith("rank_gradient"):
        tile["IN_PARTS"] = few
    elif kernel.startswith("routed_lora"):
        tile |= {"BLOCK_N": 64, "IN_PARTS": few, "STRETCH": None}
        if half and some:  # as on a GPU; fp32 sums in `expand` use a different order
            tile["STRETCH"] = 64 if few else ALL
    elif kernel in ("router_topk_backward", "gate_ranks"):
        del tile["BLOCK_D"]
    return tile


def sort_window(by):
    """How many items are sorted together; fewer for slots, as one program handles all of an expert's."""
    if INTERPRETED:
        return 256
    return 8192 if by == "slot" else 16384


def choose(kernel, x, width):
    """Launch options of `kernel` for operands like x and `width` columns of ranks or experts."""
    part, T, half = family(x.device), len(x), x.itemsize == 2
    if part == "interpreter":
        return interpreted(kernel, T, half)
    if x.dtype == torch.float16 and part == "ampere" and kernel == "routed_lora":
        T = min(T, SOME)  # the two terms of x leave no room for S: `shrink` runs first
    tile = {"num_warps": 4, "num_stages": 3} | TILES[kernel](part, T, half, width)
    splits_x = kernel == "router_topk" or (kernel in ("shrink", "routed_lora") and width > 16)
    tight = kernel == "gram_many_experts" or (kernel == "gram" and part == "ampere")
    if x.dtype == torch.float16 and tight:
        tile |= {"BLOCK_D": 32, "MAX_R": 64, "num_warps": 4}  # the same holds with dlogits
    elif x.dtype == torch.float16 and splits_x and tile["BLOCK_D"] > 32:
        tile["BLOCK_D"] //= 2  # with the router's fp32 W, an fp16 x is two bf16 terms
        if tile["BLOCK_T"] * tile["BLOCK_D"] < 256 * tile["num_warps"]:
            tile["num_warps"] //= 2  # every thread still loads 128 bits of x
    if part == "cdna":  # its warps have 64 threads
        tile |= {"num_warps": tile["num_warps"] // 2, "num_stages": 2}
    return tile
