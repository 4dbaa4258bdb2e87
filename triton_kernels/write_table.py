"""A table of integers, written on the device from the arguments of a launch.

A copy from the host would be illegal while a CUDA graph is captured, and a table kept from an earlier call
may be in memory that another graph owns.  So every call writes its own table; equal ranks need none.
The numbers are passed as runs of consecutive integers: all rows of neighboring experts are a single run.
Writes 4*N bytes, up to 32 runs per launch.

Letters: N numbers in the table.
"""

import functools

import torch
import triton
import triton.language as tl

from .launching import launch
from .numerics import INTERPRETED

RUNS = 32  # per launch
LIMIT = 2**24  # fp32 represents all integers up to here


@triton.jit(do_not_specialize=["first", "last"])
def _write_table_kernel(
    out_ptr,  # (N,)
    starts,  # COUNT floats, the start of each run; floats, unlike ints, create no kernel variants
    values,  # COUNT floats, the first number of each run
    first,
    last,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(COUNT):
        number = tl.where(i >= starts[j], values[j] + (i - starts[j]), number)
    tl.store(out_ptr + i, number.to(tl.int32), mask=i < last)


def write_table(numbers, like):
    """(N,) int32 on the device of `like`."""
    out, block = like.new_empty(len(numbers), dtype=torch.int32), 1024 if INTERPRETED else 256
    for starts, values, last in _runs(tuple(numbers)):
        first = int(starts[0])
        launch(
            like,
            _write_table_kernel,
            (triton.cdiv(last - first, block),),
            *(out, starts, values, first, last),
            COUNT=RUNS,
            BLOCK=block,
        )
    return out


@functools.lru_cache(maxsize=256)
def _runs(numbers):
    """For every launch: starts, values and the end of its last run."""
    if max(numbers, default=0) > LIMIT:
        raise ValueError(f"rank_offsets: expected at most {LIMIT} rank rows, got {max(numbers)}")
    runs = [i for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1] + 1]
    launches = []
    for k in range(0, len(runs), RUNS):
        some = runs[k : k + RUNS]
        last = runs[k + RUNS] if k + RUNS < len(runs) else len(numbers)
        starts = [float(i) for i in some] + [float(2**30)] * (RUNS - len(some))
        values = [float(numbers[i]) for i in some] + [0.0] * (RUNS - len(some))
        launches.append((tuple(starts), tuple(values), last))
    return launches
