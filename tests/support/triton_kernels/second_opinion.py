"""The kernels under ttsem, which executes the IR that Triton compiles instead of interpreting its source.

    LORA_MOE_BACKEND=reference PYTHONPATH=. python -m ttsem.sanitize \
        tests/support/triton_kernels/second_opinion.py

(`make sanitize-ttsem`.)  ttsem stops at an access outside a tensor, at a race between programs and at
undefined values; here the results are also compared with the reference.
"""

from __future__ import annotations

import time

import torch

from lora_moe import triton_kernels
from lora_moe.plan import PLANS, override
from tests.support.cases import BY_NAME, in_double, sample
from tests.support.compare import assert_accurate
from tests.support.through import NAMES, results, through

CASES = ("odd", "one past a tile", "unequal ranks", "shared A", "most experts idle")
# as in triton_calls.py: 16-bit results carry one rounding of H or dS and one of the output
UNITS = {torch.float32: 20, torch.bfloat16: 1.5}


def main():
    for plan in PLANS:
        for name in CASES:
            for dtype, units in UNITS.items():
                start = time.monotonic()
                v = sample(BY_NAME[name], dtype)
                want = results(in_double(v), BY_NAME[name], torch.float64)
                with through(triton_kernels), override(plan):
                    got = results(v, BY_NAME[name], dtype)
                for what, g, w in zip(NAMES, got, want):
                    assert_accurate(f"{plan}, {name}: {what}", g, w, units=units, dtype=dtype)
                print(f"{plan}, {name}, {dtype}: {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
