"""Chooses the plan of a call, how it exploits sparsity, from backend and shapes, never from values.

rank_dense  computes S for all R rank rows and masks it with the gate in registers: no sort, no gather.
segmented   sorts tokens by expert and computes only the rows of picked experts.
decode      for up to 16 tokens: splits the work to fill the device, in two launches.

Cost model: a launch takes the longer of moving its bytes and computing its products, plus a fixed launch
cost.  `explain` prints it; `override` and LORA_MOE_PLAN (read at import) override the choice.

Letters: T tokens, E experts, K picked per token, R rank rows.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from itertools import pairwise
from operator import index
from typing import NamedTuple

import torch

RANK_DENSE, SEGMENTED, DECODE = "rank_dense", "segmented", "decode"
PLANS = (RANK_DENSE, SEGMENTED, DECODE)
# classes of T: the plan depends on T only through these, so T may vary without recompilation
DECODE_T, PREFILL_T = 16, 4096

_forced = os.environ.get("LORA_MOE_PLAN") or None  # a plain variable: torch.compile can guard on it


class Gpu(NamedTuple):
    """A device; rates are about 70 % of the data sheet, what a dense kernel reaches."""

    bytes_per_s: float
    flops_16: float
    flops_32: float
    launch_s: float


GPUS = {
    "sm_80": Gpu(1.4e12, 2.2e14, 1.4e13, 3e-6),
    "sm_86": Gpu(0.6e12, 1.0e14, 2.0e13, 3e-6),
    "sm_89": Gpu(0.7e12, 2.0e14, 4.0e13, 3e-6),
    "sm_90": Gpu(2.4e12, 6.5e14, 4.5e13, 3e-6),
    "sm_100": Gpu(5.5e12, 1.5e15, 5.0e13, 3e-6),
    "sm_120": Gpu(1.2e12, 2.5e14, 6.0e13, 3e-6),
    "gfx90a": Gpu(1.1e12, 2.0e14, 2.5e13, 5e-6),
    "gfx942": Gpu(3.5e12, 6.0e14, 8.0e13, 5e-6),
}
BACKENDS = {"triton": PLANS, "cuda": PLANS, "cpp": (SEGMENTED,), "reference": PLANS}


class Candidate(NamedTuple):
    """Modeled cost of a plan's forward, without the base product."""

    plan: str
    launches: int
    bytes: float
    flops: float
    seconds: float


def candidates(T, D_in, D_out, ranks, top_k, dtype, gpu, shared_a=False) -> list[Candidate]:
    """Cost of each plan on a GPU, cheapest first; decode only for few tokens.

    Bytes count mandatory traffic: x, base, y, the rows of A and B that are read, the router's W, and
    what one launch leaves for the next.
    """
    device, E, R = GPUS[gpu], len(ranks), sum(ranks)
    size = 2 if dtype in (torch.bfloat16, torch.float16) else 4
    rate = device.flops_16 if size == 2 else device.flops_32
    rows_a = ranks[0] if shared_a else R
    outside = size * T * (D_in + 2 * D_out) + 4 * E * D_in  # x, base, y, W
    out = []

    def add(plan, launches, moved, flops):
        seconds = max(moved / device.bytes_per_s, flops / rate) + launches * device.launch_s
        out.append(Candidate(plan, launches, moved, flops, seconds))

    router = 2.0 * T * D_in * E
    products = 2.0 * T * (D_in * rows_a + D_out * R)
    weights = size * (D_in * rows_a + D_out * R)
    # partial sums of S go through memory, or S and H
    middle = 16 * T * R if R <= 128 else (8 + 2 * size) * T * R
    if T <= DECODE_T:
        used_b = size * D_out * R * min(1.0, T * top_k / E)
        add(DECODE, 2, outside + size * D_in * rows_a + used_b, router + products)
    add(RANK_DENSE, 3 if R <= 128 else 4, outside + weights + middle, router + products)

    held = experts_in_a_tile(T, E, top_k, tile=16)
    columns = held * max(ranks)
    blocks = max(1.0, columns / 128)  # x is read again for every 128 columns, mostly from cache
    again = size * T * D_in * (1 + 0.25 * (blocks - 1))
    used = weights * min(1.0, T * top_k / E)
    add(
        SEGMENTED,
        9,
        outside + again + used + 2 * size * T * columns + 8 * T * top_k * max(ranks),
        router + 2.0 * T * (D_in * (rows_a if shared_a else columns) + D_out * columns),
    )
    return sorted(out, key=lambda c: c.seconds)


def size_class(T) -> int:
    """The number of tokens that represents T's class in the cost model; T may be symbolic."""
    return DECODE_T if T <= DECODE_T else 1024 if T <= PREFILL_T else 2 * PREFILL_T


def experts_in_a_tile(T: int, E: int, top_k: int, tile: int) -> float:
    """Expected number of different experts in a tile of sorted tokens, for uniform routing.

    Tokens are sorted by the experts of their first two slots: a tile has few different first experts, and
    as many second ones as it has pairs.  Further slots are unsorted.  (T = 8192, K = 2, a tile of 64:
    2.0, 2.7, 5.3 and 15 of 8, 16, 32 and 64 experts; counted on random routings 2.2, 3.0, 6.0 and 17.3.)
    """
    rows = max(1, min(tile, T))
    kinds = E if top_k == 1 else E * (E - 1) / 2
    drawn = min(rows, max(1.0, rows * kinds / max(T, 1)))
    if top_k > 1:
        drawn += min(rows, 1 + rows * E / max(T, 1)) + rows * (top_k - 2)
    return E * (1 - (1 - 1 / E) ** drawn)


@contextlib.contextmanager
def override(plan: str | None):
    """Inside the block, all calls of the process use this plan; None restores the cost model's choice.

    Raises:
        ValueError: if there is no such plan.  Backends that do not support it raise when called.
    """
    if plan is not None and plan not in PLANS:
        raise ValueError(f"plan: expected one of {PLANS}, got {plan!r}")
    global _forced
    before, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = before


def choose(backend: str, T, D_in, D_out, offsets, top_k, dtype, shared_a=False) -> str:
    """The plan of a call: that of override or LORA_MOE_PLAN, or the cost model's choice.

    T may be symbolic; only its size class matters.
    Raises:
        ValueError: if the requested plan does not exist, or the backend does not support it.
    """
    if _forced is not None:
        if _forced not in BACKENDS[backend]:
            raise ValueError(
                f"plan: expected one of {BACKENDS[backend]} for the {backend} backend, got {_forced!r}"
            )
        return _forced
    if backend not in ("triton", "cuda"):
        return BACKENDS[backend][0]
    tokens = size_class(T)
    # while tracing, a layer's sizes may be symbols: convert them to numbers
    ranks = tuple(index(stop) - index(start) for start, stop in pairwise(offsets))
    sizes = index(D_in), index(D_out)
    return _cheapest(backend, tokens, *sizes, ranks, index(top_k), dtype, shared_a)


@torch.compiler.assume_constant_result
def _cheapest(*call):  # dynamo ignores lru_cache, and would trace the cost model
    return _ranked(*call)


@functools.lru_cache(maxsize=1024)
def _ranked(backend, T, D_in, D_out, ranks, top_k, dtype, shared_a):
    ranked = candidates(T, D_in, D_out, ranks, top_k, dtype, this_gpu(), shared_a)
    return next(c.plan for c in ranked if c.plan in BACKENDS[backend])


@functools.lru_cache
def this_gpu() -> str:
    """The entry of GPUS for the current GPU or the nearest one; sm_90 without a GPU."""
    if not torch.cuda.is_available():
        return "sm_90"
    if torch.version.hip:
        name = torch.cuda.get_device_properties().gcnArchName.split(":")[0]
        return name if name in GPUS else "gfx942"
    major, minor = torch.cuda.get_device_capability()
    known = sorted(int(name[3:]) for name in GPUS if name.startswith("sm_"))
    return f"sm_{max([n for n in known if n <= 10 * major + minor], default=known[0])}"


# --- experts mixed once per sample, or gated per token --------------------------------------------

# two cores with AVX-512, at the rates of the kernels on small matrices; a launch is a PyTorch call
CPU = Gpu(2e10, 1e11, 1e11, 2e-5)
MIX_CALLS = 4  # for the mixing products, and for the routing to each token's LoRA


def mixes(backend, T, B, E, r, D_in, D_out, dtype, shared_a=False) -> bool:
    """Whether mixing E experts into one LoRA per sample (per_sample.py) is faster for T tokens of B samples.

        gated    T E r D products        mixed    (T + B E) r D products, and MIX_CALLS calls

    D is D_out with a shared A, else D_in + D_out.  On a GPU the cost model includes the bytes (`candidates`).
    T may be symbolic.  False for the reference backend, which computes all samples' LoRAs for every token.
    """
    if E == 1 or B == 0:
        return False
    D_in, D_out = index(D_in), index(D_out)
    if backend in ("triton", "cuda"):
        return _mixes_on_gpu(size_class(T), B, E, r, D_in, D_out, dtype, shared_a)
    if backend != "cpp":
        return False
    size = r * (D_out if shared_a else D_in + D_out)
    once = _mixing(B, E, size, CPU)
    return int(once * CPU.flops_32 / (2 * (E - 1) * size)) < T


def _mixing(B, E, size, device):
    """Seconds for B mixtures of E matrices of this size."""
    seconds = max(4 * (B + E) * size / device.bytes_per_s, 2 * B * E * size / device.flops_32)
    return seconds + MIX_CALLS * device.launch_s


@torch.compiler.assume_constant_result
def _mixes_on_gpu(*call):
    return _mixes(*call)


@functools.lru_cache(maxsize=1024)
def _mixes(T, B, E, r, D_in, D_out, dtype, shared_a):
    gpu = this_gpu()
    device = GPUS[gpu]

    def cheapest(experts, K):
        ranks = (r,) * experts
        return candidates(T, D_in, D_out, ranks, K, dtype, gpu, shared_a)[0].seconds

    gated, size = cheapest(E, E), r * (D_out if shared_a else D_in + D_out)
    if not shared_a:  # S, its mixture and H go through memory between three additional launches
        gated += 12 * T * E * r / device.bytes_per_s + 3 * device.launch_s
    return cheapest(B, 1) + _mixing(B, E, size, device) < gated


def explain(
    T: int,
    D_in: int,
    D_out: int,
    ranks: Sequence[int],
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
) -> list[Candidate]:
    """Print the modeled cost of every plan, and which one a call with these shapes uses.

    Args:
        T: tokens.
        D_in, D_out: the linear's sizes.
        ranks: rank of every expert.
        k: picked experts per token.
        dtype: dtype of x.
        device: "cpu", "cuda" (this machine's GPU, or sm_90 without one) or an entry of GPUS.
    Returns:
        The candidates, cheapest first; empty on a CPU, whose kernels have one plan.
    Raises:
        ValueError: if the device is unknown or the shapes are invalid.
    """
    name = str(device)
    if not ranks or min(ranks) < 1 or not 1 <= k <= len(ranks) or min(D_in, D_out) < 1 or T < 0:
        raise ValueError(f"ranks, k: invalid shapes, got {T=}, {D_in=}, {D_out=}, {ranks=}, {k=}")
    if name == "cpu":
        print(f"cpp: {SEGMENTED} for all shapes: a block of tokens is sorted while in cache")
        return []
    gpu = this_gpu() if name.startswith("cuda") else name
    if gpu not in GPUS:
        raise ValueError(f"device: expected cpu, cuda or one of {tuple(GPUS)}, got {name!r}")
    ranked = candidates(T, D_in, D_out, tuple(ranks), k, dtype, gpu)
    R = sum(ranks)
    print(
        f"T={T}  {D_in} x {D_out}  E={len(ranks)}  R={R}  k={k}  {dtype}  {gpu}, forward, modeled"
    )
    print(f"{'plan':<12}{'launches':>9}{'MB':>10}{'GFLOP':>10}{'us':>10}")
    for c in ranked:
        numbers = (
            f"{c.launches:>9}{c.bytes / 1e6:>10.1f}{c.flops / 1e9:>10.2f}{c.seconds * 1e6:>10.1f}"
        )
        print(f"{c.plan:<12}{numbers}{'  <- taken' if c is ranked[0] else ''}")
    return ranked


def saved_ranks(plan: str, offsets: Sequence[int], top_k: int, shared_a: bool) -> int:
    """Number of columns of S that are saved for backward; independent of the routing.

    rank_dense and decode save one column per row of A; segmented saves, for each of the K slots, as many
    columns as the largest rank.  With a shared A all plans save r columns.
    """
    ranks = [stop - start for start, stop in pairwise(offsets)]
    if shared_a:
        return ranks[0]
    return top_k * max(ranks) if plan == SEGMENTED else sum(ranks)
