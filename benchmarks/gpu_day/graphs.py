"""Stage `graphs`: capture once, replay on new data, get the same bits as without a graph.

Letters: T tokens, E experts, K picked experts per token, D columns of x and of y.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from lora_moe import functional as F
from lora_moe import plan

K = 2
CASES = {  # ranks, options
    "equal ranks": ((16,) * 8, {}),
    "unequal ranks": ((4, 8, 16, 24), {}),
    "frozen experts": ((16,) * 8, {"frozen": (1, 5)}),
    "a scaling for each expert": ((16,) * 4, {"scaling": [1.0, 2.0, 0.5, 1.0]}),
}


class Replay:
    """Replaces a CUDA graph if there is no GPU: a replay calls the function again."""

    def __init__(self, call):
        self.replay = call


def main(tell, device, dry):
    tokens, D = ([5], 32) if dry else ([16, 1024, 4608], 1024)
    cases = dict(list(CASES.items())[1:2]) if dry else CASES
    for name, (ranks, options) in cases.items():
        for T in tokens:
            for chosen in plan.PLANS if T <= plan.DECODE_T and not dry else plan.PLANS[:2]:
                what, call = f"{name}, T={T}, {chosen}", call_of(ranks, options)
                with plan.override(chosen):
                    check_graph(tell, what, call, inputs_of(T, D, ranks, device))
    for mode in [{"backend": "aot_eager"}] if dry else [{}, {"mode": "reduce-overhead"}]:
        for name, (ranks, options) in cases.items():
            new = inputs_of(5 if dry else 64, D, ranks, device)
            check_compile(tell, f"{name}, compile {mode or ''}", ranks, options, new, mode)


def call_of(ranks, options):
    offsets = [0, *accumulate(ranks)]

    def call(x, w, a, b, dy):
        y, _ = F.routed_lora(x, w, a, b, K, rank_offsets=offsets, **options)
        return y, *torch.autograd.grad(y, (x, w, a, b), dy)

    return call


def inputs_of(T, D, ranks, device):
    return lambda seed: inputs(T, D, ranks, device, seed)


def inputs(T, D, ranks, device, seed):
    g, half = torch.Generator().manual_seed(seed), torch.bfloat16

    def normal(*shape, dtype=half):
        return (torch.randn(shape, generator=g) * shape[-1] ** -0.5).to(device, dtype)

    R, E = sum(ranks), len(ranks)
    leaves = normal(T, D), normal(E, D, dtype=torch.float32), normal(R, D), normal(R, D)
    return [v.requires_grad_() for v in leaves] + [normal(T, D)]


def check_graph(tell, name, call, new):
    """Warms up on a side stream, as PyTorch requires, captures a graph, and replays it on other data."""
    held, other = new(1), new(2)
    want = call(*other)
    try:
        graph, got = capture(call, held)
        with torch.no_grad():
            for into, new in zip(held, other):
                into.copy_(new)
        replayed = graph.replay()
        got = replayed if replayed is not None else got
        tell(name, all(map(torch.equal, got, want)), "equal bits after a replay")
    except RuntimeError as error:
        tell(name, False, str(error).splitlines()[0])


def capture(call, held):
    if not held[0].is_cuda:
        return Replay(lambda: call(*held)), None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(*held)
    return graph, got


def check_compile(tell, name, ranks, options, new, mode):
    """Checks forward and backward under torch.compile on two sets of data, one of them twice."""

    def forward(x, w, a, b):
        return F.routed_lora(x, w, a, b, K, rank_offsets=[0, *accumulate(ranks)], **options)[0]

    try:
        compiled, equal = torch.compile(forward, fullgraph=True, **mode), True
        for seed in (1, 2, 1):
            *leaves, dy = new(seed)
            results = []
            for function in (forward, compiled):
                y = function(*leaves)
                results.append([v.clone() for v in (y, *torch.autograd.grad(y, leaves, dy))])
            equal &= all(torch.allclose(p, q, rtol=2e-2, atol=1e-3) for p, q in zip(*results))
        tell(name, equal, "the same y and gradients")
    except Exception as error:  # whatever the compiler raises is a finding
        tell(name, False, f"{type(error).__name__}: {str(error).splitlines()[0]}")
