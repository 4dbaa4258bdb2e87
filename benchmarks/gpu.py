"""Two clocks for a GPU, in place of timing.warm: CUDA events, and the replay of a CUDA graph.

Events measure what a training loop pays if the host keeps up; a graph measures the kernels alone.  A
contender that synchronizes with the host cannot be captured, and the report says so.
"""

REP_MS = 20


def events(call, calls):
    """Median seconds per call by CUDA events; clears L2 before each call; triton picks their number."""
    from triton import testing

    return testing.do_bench(call, warmup=5, rep=REP_MS, return_mode="median") / 1e3


def graph(call, calls):
    """Median seconds of one call within a captured graph of many."""
    from triton import testing

    return testing.do_bench_cudagraph(call, rep=REP_MS, return_mode="median") / 1e3


CLOCKS = {"CUDA events": events, "CUDA graph": graph}
