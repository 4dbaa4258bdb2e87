"""Launches and bytes of a LoraMoeLinear, counted from the real launches, compared with other schemes.

    python -m benchmarks.accounting [--T 8192] [--D 4096] [--E 8] [--r 16] [--K 2] [--plan PLAN]
        [--slots apart|sum] [--details]

The layer runs forward and backward up to its launches (launches.py).  A kernel must move the
contents of its arguments once: the compiled code shows which of them it reads and which it writes.  The same
holds for every PyTorch operator that is neither a view nor an allocation.  Buffers with a static bound count
in full, even if a routing fills only part of them.  Only the base layer's own products are left out: anything
they read besides x, dy and its weight counts, and so does the sum of its dx and ours.
"""

from __future__ import annotations

import argparse
import json
from typing import NamedTuple

import torch

from lora_moe import LoraMoeConfig, LoraMoeLinear, Routing
from lora_moe import functional as F
from lora_moe.plan import override

from . import schemes, ttir
from .launches import Launch, Operator, launches
from .on_chip import on_chip

ALLOCATIONS = (
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
)
OVERWRITES = (
    "copy_",
    "fill_",
    "zero_",
    "zeros_like",
    "ones_like",
    "full_like",
)  # these do not read their first argument


class Moved(NamedTuple):
    """Bytes of memory read and written, bytes from L2 to the multiprocessors, products, programs."""

    name: str
    read: int
    written: int
    l2: int = 0
    flops: int = 0
    programs: int | None = None  # None for PyTorch's operators: enough to fill a device
    launches: int = 1


def count(events):
    """Yields Moved for each launch."""
    for event in events:
        moved = COUNTED[type(event)](event)
        if moved is not None:
            yield moved


def kernel(launch):
    if isinstance(launch.kernel, Exception):
        raise launch.kernel
    sides = {True: set(), False: set()}
    for access in ttir.accesses(launch.kernel.asm["ttir"]):
        sides[True] |= {access.argument} if access.reads else set()
        sides[False] |= {access.argument} if access.writes else set()
    read, written = ({a: size(launch.args[a]) for a in side} for side in sides.values())
    return Moved(launch.name, sum(read.values()), sum(written.values()), *on_chip(launch, read))


def operator(event):
    name = event.func._opname
    results = tensors(event.result)
    if event.func.is_view or name in ALLOCATIONS or not any(v.numel() for v in results):
        return None
    arguments = tensors(event.args)
    written = [
        v
        for v, a in zip(event.args, event.func._schema.arguments)
        if a.alias_info and a.alias_info.is_write
    ]
    if name in OVERWRITES:
        arguments = arguments[1:]
    written = written or results
    read = sum(map(size, arguments))
    return Moved(f"aten::{name}", read, sum(map(size, written)), read)


class Added(NamedTuple):
    """The tensor that the base's product is added to, within its launch."""

    target: torch.Tensor


def added(event):
    n = size(event.target)
    return Moved("sum in the base's product", n, 0, n, launches=0)


COUNTED = {Launch: kernel, Operator: operator, Added: added}


def tensors(values):
    if isinstance(values, torch.Tensor):
        return [values]
    return (
        [v for value in values for v in tensors(value)] if isinstance(values, (tuple, list)) else []
    )


def size(v):
    """Bytes of v's elements, each counted once: an expanded axis costs nothing."""
    n = v.element_size()
    for length, stride in zip(v.shape, v.stride()):
        n *= length if stride or not length else 1
    return n


def layer(s, *, plan=None, dtype=torch.bfloat16, target="sm_90", adapters="base"):
    """(forward, backward) of one LoraMoeLinear, as lists of Moved; `adapters`: dtype of A and B."""
    base = torch.nn.Linear(s.D, s.D, bias=False, dtype=dtype, device="meta").requires_grad_(False)
    experts = LoraMoeLinear(
        base, LoraMoeConfig(num_experts=s.E, r=s.r, top_k=s.K, adapter_dtype=adapters)
    )
    x = torch.empty(s.T, s.D, dtype=dtype, device="meta", requires_grad=True)
    with override(plan), launches(target) as forward:
        y = experts(x)
    trained = [p for p in experts.parameters() if p.requires_grad]
    with launches(target) as backward:
        torch.autograd.grad(y, [x, *trained], torch.empty_like(y))
    return tuple(list(count(ours(events, base))) for events in (forward, backward))


def grouped(s, slots, *, dtype=torch.bfloat16, target="sm_90"):
    """(forward, backward) of grouped_lora with a row per slot, and a base per token without a gradient."""
    like = {"device": "meta", "dtype": dtype}
    own = (s.T, s.K, s.D)
    x = torch.empty(own if slots == "sum" else (s.T, s.D), **like, requires_grad=True)
    a, b = (torch.empty(s.E * s.r, s.D, **like, requires_grad=True) for _ in "ab")
    gates = torch.empty(s.T, s.K, device="meta", requires_grad=True)
    ids = torch.empty(s.T, s.K, dtype=torch.int32, device="meta")
    routing, base = Routing.from_ids(ids, gates, num_experts=s.E), torch.empty(s.T, s.D, **like)
    with launches(target) as forward:
        y = F.grouped_lora(x, a, b, routing, rank_offsets=s.r, base=base, slots=slots)
    with launches(target) as backward:
        torch.autograd.grad(y, [x, a, b, gates], torch.empty_like(y))
    return tuple(list(count(events)) for events in (forward, backward))


def ours(events, base):
    """Without the base layer's own products; if one adds to an existing tensor, that read counts as ours."""
    weight = base.weight.untyped_storage()._cdata
    for event in events:
        if isinstance(event, Operator):
            of_base = any(v.untyped_storage()._cdata == weight for v in tensors(event.args))
            if of_base and event.func._opname == "addmm_":
                yield Added(event.args[0])
            if of_base:
                continue
        yield event


# --- tables ------------------------------------------------------------------------------------------


def total(moved):
    return sum(m.launches for m in moved), sum(m.read + m.written for m in moved)


def table(s, plan=None):
    """One Markdown row per scheme: launches and megabytes, forward and backward."""
    yield f"T={s.T}, {s.D}x{s.D}, E={s.E}, r={s.r}, K={s.K}, bf16: added to the base GEMM\n"
    yield "| scheme | forward launches | forward MB | backward launches | backward MB |"
    yield "|---|---|---|---|---|"
    forward, backward = layer(s, plan=plan)
    yield cells("**ours**, counted from the launches", total(forward), total(backward))
    for name, (there, back) in schemes.SCHEMES.items():
        back = schemes.total(back(s)) if back else None
        if name == "MeteoRA":
            name += f" (and {schemes.meteora_in_l2(s) / 1e9:.0f} GB of L2)"
        yield cells(f"{name}, modeled", schemes.total(there(s)), back)


def cells(name, *sides):
    numbers = (f"{side[0]} | {side[1] / 1e6:,.0f}" if side else "- | -" for side in sides)
    return f"| {name} | {' | '.join(numbers)} |"


def details(s, plan=None):
    """One row per launch of ours."""
    yield from rows(layer(s, plan=plan))


def rows(sides):
    yield "\n| | launch | reads MB | writes MB | L2 reads MB | programs |\n|---|---|---|---|---|---|"
    for side, moved in zip(("forward", "backward"), sides):
        for m in moved:
            sizes = (f"{n / 1e6:.2f}" for n in (m.read, m.written, m.l2))
            yield f"| {side} | {m.name} | {' | '.join(sizes)} | {m.programs or '-'} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for letter, default in {"T": 8192, "D": 4096, "E": 8, "r": 16, "K": 2}.items():
        parser.add_argument(f"--{letter}", type=int, default=default)
    parser.add_argument("--plan", help="overrides the cost model's choice")
    parser.add_argument(
        "--slots", choices=("apart", "sum"), help="grouped_lora with a row per slot instead"
    )
    parser.add_argument("--details", action="store_true", help="also list every launch of ours")
    parser.add_argument("--json", action="store_true", help="only ours: [name, read, written], ...")
    args = parser.parse_args()
    s = schemes.Shape(args.T, args.D, args.E, args.r, args.K)
    if args.json or args.slots:
        sides = grouped(s, args.slots) if args.slots else layer(s, plan=args.plan)
        print(
            json.dumps(dict(zip(("forward", "backward"), sides)))
            if args.json
            else "\n".join(rows(sides))
        )
        return
    for line in (*table(s, args.plan), *(details(s, args.plan) if args.details else ())):
        print(line)
