"""A model, not a measurement, of the time that experts add to a layer on a GPU, against dense cuBLAS
products.

    python -m benchmarks.gpu_model [--E 8] [--markdown FILE]

A program takes as long as the slowest of its shares of memory, L2 and tensor cores.  A kernel takes as
many of these times as the busiest multiprocessor has programs: whole waves.  Launches cost nothing, as
in a CUDA graph, and no operand stays in L2 from one kernel to the next.  The baseline is `stacked` of
benchmarks/peers.py under torch.compile: its elementwise work is fused, every product uses the tile and
the split of its inner axis that are best in this same model, and the router is a separate product.

Letters: T tokens, E experts, K picked experts per token, R rank rows, D columns of x and of y.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from . import schemes


class Gpu(NamedTuple):
    """90% of the data sheet's memory rate, 37% of 64 bytes per clock and multiprocessor, 80% of bf16."""

    bytes_per_s: float
    l2_bytes_per_s: float
    flops: float
    multiprocessors: int


GPUS = {
    "H100": Gpu(3.0e12, 5.5e12, 800e12, 132),
    "A100": Gpu(1.8e12, 3.6e12, 250e12, 108),
    "B200": Gpu(7.2e12, 6.5e12, 1800e12, 148),
    "RTX 4090": Gpu(0.9e12, 7.6e12, 132e12, 128),
    "MI300X": Gpu(4.8e12, 15.1e12, 1050e12, 304),
}
TARGETS = {
    "H100": "sm_90",
    "A100": "sm_80",
    "B200": "sm_100",
    "RTX 4090": "sm_89",
    "MI300X": "gfx942",
}
TOKENS = range(1024, 16384 + 1, 256)


def seconds(gpu, moved, l2, flops, programs=None):
    """Seconds of one launch; without `programs`, they are assumed to fill the device evenly."""
    time = max(moved / gpu.bytes_per_s, l2 / gpu.l2_bytes_per_s, flops / gpu.flops)
    if not programs:
        return time
    waves = -(-programs // gpu.multiprocessors)
    return time * waves * gpu.multiprocessors / programs


def of(gpu, launches):
    return sum(seconds(gpu, m.read + m.written, m.l2, m.flops, m.programs) for m in launches)


# --- the baseline ------------------------------------------------------------------------------------

TILES = [(m, n) for m in (64, 128, 256) for n in (16, 32, 64, 128, 256) if m * n <= 128 * 256]
SPLITS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)


def product(gpu, M, N, K, *, out=2, added=0):
    """An (M, N) product over K of bf16 operands with its best tile; `added`: bytes it is added to."""
    operands, result = 2 * K * (M + N), out * M * N
    best = float("inf")
    for m, n in [*TILES, *((n, m) for m, n in TILES)]:
        rows, columns = -(-M // m), -(-N // n)
        for split in SPLITS:
            if split > 1 and K // split < 128:
                continue
            l2 = 2 * K * (M * columns + N * rows) + added
            partial = 0 if split == 1 else 4 * split * M * N
            flops = 2 * rows * m * columns * n * K
            time = seconds(
                gpu, operands + added + (partial or result), l2, flops, rows * columns * split
            )
            if partial:
                time += seconds(gpu, partial + result, partial, 0)
            best = min(best, time)
    return best


def elementwise(gpu, read, written):
    return seconds(gpu, read + written, read, 0)


def stacked(gpu, s):
    """(forward, backward): router, mask and two dense products, added to the base."""
    R, x = s.E * s.r, s.activation
    wide, gate = 2 * s.T * R, 4 * s.T * s.E
    forward = (
        product(gpu, s.T, s.E, s.D)
        + elementwise(gpu, gate, 2 * gate)  # softmax, top-k, mask
        + product(gpu, s.T, R, s.D)
        + elementwise(gpu, wide + gate, wide)
        + product(gpu, s.T, s.D, R, added=x)
    )
    return forward, products_back(gpu, s) + (
        product(gpu, s.E, s.D, s.T)  # dW
        + product(gpu, s.T, s.D, s.E)  # dx of the router
        + elementwise(gpu, 3 * x, x)  # of the base, of A, of the router
    )


def products_back(gpu, s):
    R = s.E * s.r
    wide, gate = 2 * s.T * R, 4 * s.T * s.E
    return (
        product(gpu, s.T, R, s.D)  # dH
        + product(gpu, R, s.D, s.T)  # dB
        + elementwise(gpu, 2 * wide + gate, wide + gate)  # dS, dgate
        + elementwise(gpu, 2 * gate, gate)  # dlogits
        + product(gpu, R, s.D, s.T)  # dA
        + product(gpu, s.T, s.D, R)  # dx of A
    )


def in_one(gpu, s):
    """As `stacked`, with the router's rows below A's in one bf16 product, which rounds the router."""
    R, x = s.E * s.r, s.activation
    wide, gate = 2 * s.T * R, 4 * s.T * s.E
    forward = (
        product(gpu, s.T, R + s.E, s.D)
        + elementwise(gpu, wide + 2 * gate, wide + gate)
        + product(gpu, s.T, s.D, R, added=x)
    )
    back = (
        product(gpu, s.T, R, s.D)
        + product(gpu, R, s.D, s.T)
        + elementwise(gpu, 2 * wide + 3 * gate, wide + gate)
        + product(gpu, R + s.E, s.D, s.T)
        + product(gpu, s.T, s.D, R + s.E)
        + elementwise(gpu, 2 * x, x)
    )
    return forward, back


# --- tables ------------------------------------------------------------------------------------------


def sides(gpu, s):
    """Microseconds by scheme: (forward, backward) of ours, stacked, stacked with A and W in one product."""
    from .accounting import layer

    ours = tuple(of(GPUS[gpu], side) for side in layer(s, target=TARGETS[gpu]))
    both = ours, stacked(GPUS[gpu], s), in_one(GPUS[gpu], s)
    return [tuple(1e6 * t for t in side) for side in both]


def table(gpu, E, r=16, K=2, D=4096, tokens=TOKENS):
    yield f"\n## {gpu}: {D} x {D}, E={E}, r={r}, K={K}, bf16\n"
    columns = "us | stacked | ratio | A and W in one"
    yield f"| T | forward {columns} | backward {columns} |"
    yield "|" + "---|" * 9
    for T in tokens:
        schemes_of = sides(gpu, schemes.Shape(T, D, E, r, K))
        cells = []
        for ours, rival, one in zip(*schemes_of):
            cells += [f"{ours:.0f}", f"{rival:.0f}", f"{ours / rival:.2f}", f"{one:.0f}"]
        yield f"| {T} | {' | '.join(cells)} |"


def document(gpus, E):
    rule = " ".join(Gpu.__doc__.split())
    yield "# Modeled time that the experts add to a layer, compared with dense matmuls\n"
    yield "A model (`python -m benchmarks.gpu_model`), not a measurement: whole waves, no launch cost, the"
    yield f"baseline at its best tile. Rates: {rule} A ratio above 1 means that ours is slower."
    for gpu in gpus:
        yield from table(gpu, E, tokens=TOKENS if gpu == "H100" else TOKENS[::12])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--E", type=int, default=8)
    parser.add_argument("--gpus", default=",".join(GPUS), help="names, separated by commas")
    parser.add_argument("--markdown", type=Path, help="write the tables to a file")
    parser.add_argument("--json", action="store_true", help="only --T tokens, by GPU")
    parser.add_argument("--T", type=int, default=8192)
    args = parser.parse_args()
    gpus = args.gpus.split(",")
    if args.json:
        s = schemes.Shape(args.T, 4096, args.E, 16, 2)
        print(json.dumps({gpu: sides(gpu, s) for gpu in gpus}))
        return
    lines = document(gpus, args.E)
    if args.markdown is None:
        for line in lines:
            print(line, flush=True)
        return
    args.markdown.parent.mkdir(parents=True, exist_ok=True)
    args.markdown.write_text("\n".join(lines) + "\n")
