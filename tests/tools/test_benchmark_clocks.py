"""The benchmarks' clocks, limits and tables."""

from __future__ import annotations

import contextlib
import math
import platform
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import command, gpu, machine, peers, report, suite, timing
from benchmarks import contenders as entry
from benchmarks.shapes import Shape, sample
from lora_moe import backend, plan

SMALL = Shape(13, 24, 16, 5, 4, 2)
DENSE = Shape(9, 24, 16, 4, 4, 4)
SINGLE = Shape(9, 24, 16, 4, 4, 1, "zipf")
FEW = Shape(2, 24, 16, 5, 4, 1)  # most experts get no token

some_shapes = pytest.mark.parametrize("shape", [SMALL, DENSE, SINGLE, FEW], ids=str)


def fake_clock(seconds, log):
    def clock(call, calls):
        log.append((call, calls))
        if isinstance(seconds[call], Exception):
            raise seconds[call]
        return seconds[call]

    return clock


def test_contenders_take_turns():
    log = []
    clock = fake_clock({"a": 0.001, "b": 0.002, "c": 0.5}, log)
    found = timing.interleave({n: n for n in "abc"}, 3, clock, laggard=math.inf)
    assert [call for call, _ in log] == [*"abc", *"abc", *"bca", *"cab"]
    assert {name: len(s) for name, s in found.items()} == {"a": 3, "b": 3, "c": 3}
    calls = dict(log[3:])  # a sample takes SAMPLE_S or one call
    assert calls == {
        "a": round(timing.SAMPLE_S / 0.001),
        "b": round(timing.SAMPLE_S / 0.002),
        "c": 1,
    }


def test_laggard_keeps_its_first_turns():
    clock = fake_clock({"a": 1.0, "b": 4.9, "c": 5.1}, [])
    found = timing.interleave({n: n for n in "abc"}, 7, clock)
    assert {name: len(s) for name, s in found.items()} == {
        "a": 7,
        "b": 7,
        "c": timing.LAGGARD_TURNS,
    }


def test_one_slow_turn_makes_no_laggard():
    turns = {"a": iter([1.0] * 9), "b": iter([1.0, 60.0, 2.0, *[2.0] * 6])}
    found = timing.interleave({n: n for n in "ab"}, 7, lambda call, calls: next(turns[call]))
    assert [len(s) for s in found.values()] == [7, 7]


def test_clock_that_cannot_time_a_contender():
    clock, told = fake_clock({"a": 1.0, "b": RuntimeError("no capture")}, []), {}
    found = timing.interleave({"a": "a", "b": "b"}, 2, clock, refuse=told.__setitem__)
    assert list(found) == ["a"]
    assert str(told["b"]) == "no capture"
    with pytest.raises(RuntimeError, match="no capture"):
        timing.interleave({"b": "b"}, 2, clock)
    assert timing.interleave({"b": "b"}, 2, clock, refuse=told.__setitem__) == {}


def test_ratios_are_taken_turn_by_turn():
    slow_second_turn = timing.ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0])
    assert slow_second_turn == timing.Ratio(2.0, 2.0, pytest.approx(2.1))
    assert timing.ratio([3.0, 3.0, 3.0], [1.0]) == timing.Ratio(3.0, 3.0, 3.0)


@some_shapes
@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_of_the_loop(shape, backward):
    inputs = sample(shape, torch.float64)
    states = entry.states(peers.separate, shape, inputs, backward, 1)
    call = entry.prepare(peers.loop_over_experts, states, shape.K, inputs.dy if backward else None)
    with FlopCounterMode(display=False) as counter:
        call()
    assert shape.flops(backward) == counter.get_total_flops()


def test_bytes_count_each_tensor_once():
    x, router, y = 2 * 24, 5 * 24, 2 * 16
    one = 4 * 24 + 4 * 16  # an expert's rows of A and B
    assert FEW.bytes(4, touched=2) == 4 * (x + router + 2 * one + y)
    gradients = x + y + router + 5 * one  # dx, dy, drouter, dense dA and dB
    again = x + router + 2 * one
    assert FEW.bytes(2, touched=2, backward=True) == 2 * (
        x + router + 2 * one + y + again + gradients
    )


def row_of(ours, peer, **rest):
    seconds = {"ours": ours, "stacked": peer, "loop": [9.0] * 2, "plain LoRA": [0.1] * 7}
    facts = {"text": "shape", "dtype": "float32", "pass": "forward", "clock": "wall clock"}
    return facts | {"flops": 8e9, "bytes": 1e9, "seconds": seconds, "left_out": {}} | rest


MACHINE = {"gemm": {"float32": 2e9, "bfloat16": 8e9}, "bandwidth": 4e9}


def test_limit_is_the_larger_of_flops_and_bytes():
    judged = report.judge(row_of([4.0] * 7, [6.0] * 7), MACHINE)
    assert judged.best == "stacked"  # plain LoRA is faster but computes another function
    assert judged.gain.median == 1.5
    assert judged.limit_s == 1.0  # 8e9 FLOPs at the best rate of any dtype; bytes take 0.25 s
    assert (judged.of_limit, judged.of_own) == (0.25, 1.0)
    starved = report.judge(row_of([4.0] * 7, [6.0] * 7, bytes=8e9), MACHINE)
    assert starved.limit_s == 2.0


def test_row_without_ours_or_peers_has_no_verdict():
    row = row_of([4.0], [6.0])
    assert report.judge(row | {"seconds": {"stacked": [1.0]}}, MACHINE) is None
    assert report.judge(row | {"seconds": {"ours": [1.0], "ours, decode": [1.0]}}, MACHINE) is None


def test_limits_are_measured():
    limits = machine.limits(clock=lambda call, calls: call() is None or 0.5, quick=True)
    assert limits["gemm"] == dict.fromkeys(("float32", "bfloat16"), 2 * 128**3 / 0.5)
    assert limits["bandwidth"] == 2 * (1 << 20) / 0.5
    faster = {"gemm": {"float32": 1.0, "bfloat16": math.inf}, "bandwidth": 1.0}
    assert machine.best(limits, faster)["gemm"] == limits["gemm"] | {"bfloat16": math.inf}
    assert machine.best(faster, limits)["bandwidth"] == limits["bandwidth"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_memory_is_not_mapped_again():
    script = """
import resource, torch
from benchmarks import machine
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fresh = [faults() for _ in range(3)]  # 64 MiB are always mapped and given back
machine.keep_memory()
for _ in range(20):  # until small blocks no longer take their place
    faults()
print(min(fresh), max(faults() for _ in range(3)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=command.ROOT, check=True, capture_output=True, text=True
    )
    fresh, kept = map(int, done.stdout.split())
    assert fresh > 16
    assert kept < fresh / 4


def test_decode_does_not_run_from_cache():
    decode, train = Shape(1, 64, 64, 8, 4), Shape(64, 64, 64, 8, 4)
    cache = 1 << 20
    inputs = sample(decode, torch.float32)
    copies = entry.copies_for(decode, inputs, cache)
    assert copies * 4 * inputs.touched * 4 * 128 >= 4 * cache
    assert entry.copies_for(train, sample(train, torch.float32), cache) == 1
    states = entry.states(peers.rows, decode, inputs, False, 3)
    seen = []
    call = entry.prepare(lambda x, router, a, b, k: seen.append(a) or x, states, 2, None)
    for _ in range(4):
        call()
    assert len({a.data_ptr() for a in seen}) == 3
    assert seen[3] is seen[0]


@pytest.mark.parametrize(
    ("clock", "name"), [(gpu.events, "do_bench"), (gpu.graph, "do_bench_cudagraph")]
)
def test_gpu_clocks_return_seconds(monkeypatch, clock, name):
    testing = pytest.importorskip("triton.testing")
    done = []

    def fake(call, return_mode, **_):
        call()
        return {"median": 3.0}[return_mode]  # ms

    monkeypatch.setattr(testing, name, fake)
    assert clock(lambda: done.append(1), 5) == 0.003
    assert done


def test_every_plan_is_a_contender_on_a_gpu(monkeypatch):
    forced = []

    @contextlib.contextmanager
    def override(name):
        forced.append(name)
        yield

    with monkeypatch.context() as patch:
        patch.setattr(backend, "serving", {"cuda": "triton"}.__getitem__)
        some = {c.name: c for c in entry.contenders("cuda", compiled=False)}
    monkeypatch.setattr(plan, "override", override)
    inputs = sample(SMALL, torch.float32)
    for name in plan.PLANS:
        y = some[f"ours, {name}"].forward(inputs.x, inputs.router, inputs.a, inputs.b, 2)
        assert y.shape == (SMALL.T, SMALL.D_out)
        assert not report.is_peer(f"ours, {name}")
    assert forced == list(plan.PLANS)


def test_each_clock_gives_a_row_and_says_what_it_cannot_time(monkeypatch):
    capturing = []

    def syncs(*args):
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return peers.stacked(*args)

    def capture(call, calls):
        capturing.append(True)
        try:
            call()
        finally:
            capturing.clear()
        return 0.5

    some = [entry.Contender("ours", entry.ours), entry.Contender("syncs", syncs)]
    monkeypatch.setattr(entry, "contenders", lambda *_: some)
    clocks = {"CUDA events": lambda call, calls: 0.25, "CUDA graph": capture}
    options = suite.Options(repeats=2, compiled=False, clocks=clocks)
    events, graph = suite.measure(SMALL, torch.float32, "forward", options)
    assert (events["clock"], graph["clock"]) == ("CUDA events", "CUDA graph")
    assert events["seconds"] == {"ours": [0.25] * 2, "syncs": [0.25] * 2}
    assert graph["seconds"] == {"ours": [0.5] * 2}
    assert "capturing" in graph["left_out"]["syncs"]
    assert not events["left_out"]


def test_a_gpu_is_the_default_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = command.options_of(command.parse([]))
    assert (options.device, options.clocks) == ("cuda", gpu.CLOCKS)
    assert command.options_of(command.parse(["--device=cpu"])).clocks == suite.CPU_CLOCKS
