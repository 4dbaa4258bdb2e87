"""Prints, as JSON, the initial accumulator of every dot in a router's kernels, by operand dtypes.

Triton merges `sum + dot` into one instruction, whose accumulator truncates: see test_triton_numerics.py.
"""

from __future__ import annotations

import json
import re

import torch
from lora_moe.triton_kernels.shrink import shrink_splits

from benchmarks.static.launches import Launch, launches

DOT = re.compile(r"(%\S+) = tt\.dot \S+, \S+, (%[^ ,]+)")


def starts(ttir):
    """[kind of each dot's accumulator]: "zero", "dot" (another dot's result) or "carried" by a loop."""
    results, kinds = set(), []
    for result, accumulator in DOT.findall(ttir):
        constant = re.search(rf"{re.escape(accumulator)} = arith\.constant dense<0", ttir)
        kinds.append("zero" if constant else "dot" if accumulator in results else "carried")
        results.add(result)
    return kinds


def main():
    found = {}
    for x_dtype in (torch.bfloat16, torch.float16):
        for w_dtype in (torch.float32, x_dtype):
            x = torch.empty(8192, 4096, device="meta", dtype=x_dtype)
            w = torch.empty(8, 4096, device="meta", dtype=w_dtype)
            with launches("sm_90") as seen:
                shrink_splits(x, None, w)
                shrink_splits(x, w.to(x_dtype), None)
            router, plain = (e.kernel.asm["ttir"] for e in seen if isinstance(e, Launch))
            found[f"{x_dtype}, {w_dtype}"] = {"router": starts(router), "A": starts(plain)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
