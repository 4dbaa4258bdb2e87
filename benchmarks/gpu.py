"""The two clocks of a GPU, in place of timing.warm: CUDA events, and the replay of a CUDA graph.

Events count what a training loop pays when the host keeps up; a graph counts the kernels alone.  A
contender that makes the host wait cannot be captured, and the report says so.
"""

REP_MS = 20


def events(call, calls):
    """Median seconds of one call by CUDA events, the L2 cache cleared before each; triton counts calls."""
    from triton import testing

    return testing.do_bench(call, warmup=5, rep=REP_MS, return_mode="median") / 1e3


def graph(call, calls):
    """Median seconds of one call within a captured graph of many."""
    from triton import testing

    return testing.do_bench_cudagraph(call, rep=REP_MS, return_mode="median") / 1e3


CLOCKS = {"CUDA events": events, "CUDA graph": graph}
