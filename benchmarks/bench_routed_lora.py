"""pytest benchmarks/bench_routed_lora.py --benchmark-enable: ours and the eager peers on the claims' shapes.

For numbers to report, use `lora-moe bench`, which interleaves the contenders.
"""

import pytest
import torch

from benchmarks import contenders as entry
from benchmarks import machine
from benchmarks.shapes import CLAIMS, sample

CONTENDERS = list(entry.contenders(compiled=False))


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", CLAIMS, ids=str)
def test_routed_lora(benchmark, shape, dtype, backward, contender):
    benchmark.group = f"{shape} {dtype} {'forward+backward' if backward else 'forward'}"
    if not contender.differs(dtype):
        pytest.skip("the same as ours")
    inputs = sample(shape, dtype)
    copies = entry.copies_for(shape, inputs, machine.cache_bytes())
    states = entry.states(contender.layout, shape, inputs, backward, copies, contender.adapters)
    benchmark(entry.prepare(contender.forward, states, shape.K, inputs.dy if backward else None))
