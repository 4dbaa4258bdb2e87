"""pytest benchmarks/bench_router_topk.py --benchmark-enable: our router against softmax and top-k."""

import pytest
import torch

from benchmarks import peers
from benchmarks.shapes import CLAIMS, sample
from lora_moe import functional

ROUTERS = {"ours": functional.router_topk, "eager": peers.route}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", CLAIMS, ids=str)
def test_router_topk(benchmark, shape, dtype, name):
    benchmark.group = f"{shape} {dtype}"
    inputs = sample(shape, dtype)
    benchmark(ROUTERS[name], inputs.x, inputs.router, shape.K)
