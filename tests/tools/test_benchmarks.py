"""The benchmarks' arithmetic, their peers against fp64, and the command; no test measures time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import command, compare, end_to_end, gpu, machine, peers, report, suite, timing
from benchmarks import contenders as entry
from benchmarks.shapes import CLAIMS, SETS, Shape, sample
from lora_moe import LoraMoeConfig, LoraMoeLinear, backend, cli, plan

SMALL = Shape(13, 24, 16, 5, 4, 2)
DENSE = Shape(9, 24, 16, 4, 4, 4)
SINGLE = Shape(9, 24, 16, 4, 4, 1, "zipf")
FEW = Shape(2, 24, 16, 5, 4, 1)  # most experts get no token

SAME = [c for c in entry.contenders(compiled=False) if c.same]

some_shapes = pytest.mark.parametrize("shape", [SMALL, DENSE, SINGLE, FEW], ids=str)


# --- timing


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
    calls = dict(log[3:])  # a sample lasts SAMPLE_S, or one call
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


def test_one_disturbed_turn_makes_no_laggard():
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


def test_ratio_goes_turn_by_turn():
    slow_second_turn = timing.ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0])
    assert slow_second_turn == timing.Ratio(2.0, 2.0, pytest.approx(2.1))
    assert timing.ratio([3.0, 3.0, 3.0], [1.0]) == timing.Ratio(3.0, 3.0, 3.0)


# --- FLOPs, bytes and the limit


@some_shapes
@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_that_the_loop_needs(shape, backward):
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
    assert judged.best == "stacked"  # plain LoRA is faster, and another function
    assert judged.gain.median == 1.5
    assert judged.limit_s == 1.0  # 8e9 FLOPs at the best rate of any dtype, not 0.25 s of bytes
    assert (judged.of_limit, judged.of_own) == (0.25, 1.0)
    starved = report.judge(row_of([4.0] * 7, [6.0] * 7, bytes=8e9), MACHINE)
    assert starved.limit_s == 2.0


def test_row_without_ours_or_peers_is_no_verdict():
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


# --- inputs and peers


@some_shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_inputs_hold_the_routing_that_was_drawn(shape, dtype):
    inputs = sample(shape, dtype)
    ids, _, gate = peers.route(inputs.x, inputs.router, shape.K)
    assert torch.equal(ids.sort().values, inputs.ids.sort().values)
    assert all(len(set(row)) == shape.K for row in inputs.ids.tolist())
    assert inputs.touched == ids.unique().numel()
    assert gate.max() < 0.99  # no expert drowns the others' gradients


def test_zipf_has_favourites():
    shape = Shape(4000, 16, 16, 8, 4, 1, "zipf")
    counts = sample(shape, torch.float32).ids.flatten().bincount(minlength=8)
    expected = 1 / torch.arange(1.0, 9)
    assert torch.allclose(counts / 4000, expected / expected.sum(), atol=0.03)


def literal(x, router, a, b, top_k):
    """Token by token, expert by expert, number by number as the formula has it."""
    r = len(a) // len(router)
    out = []
    for token in x:
        p = torch.softmax(router @ token, 0)
        picked = p.argsort(descending=True)[:top_k]
        weights = p[picked] / (p[picked].sum() if top_k > 1 else 1)
        y = 0
        for g, e in zip(weights, picked.tolist()):
            rows = slice(e * r, (e + 1) * r)
            y = y + g * (b[rows].T @ (a[rows] @ token))
        out.append(y)
    return torch.stack(out)


@some_shapes
@pytest.mark.parametrize("peer", SAME, ids=lambda peer: peer.name)
def test_peers_compute_the_formula(shape, peer):
    """Ours among them; outputs and all gradients."""
    inputs = sample(shape, torch.float64)
    if peer.name == "grouped_mm":  # takes no fp64
        inputs = dataclasses.replace(
            inputs, **{n: getattr(inputs, n).float() for n in ("x", "router", "a", "b", "dy")}
        )
    states = entry.states(peer.layout, shape, inputs, True, 1)
    out = entry.joined(
        entry.prepare(peer.forward, states, shape.K, inputs.dy)(), peer.layout, shape
    )
    double = [getattr(inputs, n).double().requires_grad_() for n in ("x", "router", "a", "b")]
    y = literal(*double, shape.K)
    right = [y, *torch.autograd.grad(y, double, inputs.dy.double())]
    limit = 64 if inputs.x.dtype == torch.float32 else 1000  # units in the last place
    assert entry.units(out, right, inputs.x.dtype) < limit
    assert all(0.05 < t.square().mean().sqrt() < 50 for t in (y, right[1]))


def test_plain_lora_is_pefts():
    peft = pytest.importorskip("peft")
    base = torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False))
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    wrapped = peft.get_peft_model(base, config).base_model.model[0]
    x = sample(SMALL, torch.float32).x
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    with torch.no_grad():
        assert torch.equal(wrapped.base_layer(x) + peers.plain_lora(x, None, a, b, 2), wrapped(x))


def wrong_gate(x, router, a, b, top_k):
    return 1.1 * peers.stacked(x, router, a, b, top_k)


def wrong_gradient(x, router, a, b, top_k):
    return peers.stacked(x, router, a.detach() * 0.5 + a * 0.5, b, top_k)


def not_a_number(x, router, a, b, top_k):
    return peers.stacked(x, router, a, b, top_k) * float("nan")


def crash(*args):
    raise RuntimeError("\nfirst line\nsecond")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_contenders_are_not_timed(monkeypatch, dtype):
    names = (wrong_gate, wrong_gradient, not_a_number, crash, peers.stacked)
    monkeypatch.setattr(
        entry, "contenders", lambda *_: [entry.Contender(f.__name__, f) for f in names]
    )
    inputs = sample(SMALL, dtype)
    calls, errors, left_out = suite.admit(SMALL, inputs, True, 1, suite.Options(compiled=False))
    assert list(calls) == ["stacked"]
    assert errors["stacked"] < entry.LIMITS[dtype]
    assert left_out["crash"] == "RuntimeError: first line"
    assert all("from fp64" in left_out[f.__name__] for f in names[:3])


def test_hopeless_contenders_are_left_out():
    with pytest.raises(entry.LeftOut, match="GiB"):
        entry.refuse_hopeless("gather, compiled", Shape(8192, 4096, 4096, 8, 64), 4)
    with pytest.raises(entry.LeftOut, match="experts"):
        entry.refuse_hopeless("every expert, compiled", Shape(1, 64, 64, 64, 8), 4)
    with pytest.raises(entry.LeftOut, match="16 tokens"):
        entry.refuse_hopeless("ours, decode", Shape(17, 64, 64, 8, 8), 4)
    entry.refuse_hopeless("ours, decode", Shape(16, 64, 64, 8, 8), 4)
    entry.refuse_hopeless("loop", Shape(8192, 4096, 4096, 64, 64), 4)


def test_compiled_peers_are_among_the_contenders():
    names = [c.name for c in entry.contenders(compiled=True) if report.is_peer(c.name)]
    same = [p.name for p in peers.PEERS if p.same]
    assert names == [text for name in same for text in (name, f"{name}, compiled")]


def test_sets_hold_what_was_promised():
    assert len(CLAIMS) == 6
    shapes = SETS["all"]
    assert set(CLAIMS) < set(shapes)
    assert {1, 8192} <= {s.T for s in shapes}
    assert {4, 128} <= {s.E for s in shapes}
    assert {4, 64} <= {s.r for s in shapes}
    assert {1, 2, 4} <= {s.K for s in shapes}
    assert any(s.K == s.E for s in shapes)
    assert any(s.routing == "zipf" for s in shapes)
    assert len({str(s) for s in shapes}) == len(shapes)  # compare knows rows by name


# --- two runs


def run_of(ours):
    """Seven turns with a spread of 4 %; on a machine that drifts by 30 %."""
    drift = [1.0, 1.1, 1.2, 1.3, 1.2, 1.1, 1.0]
    noise = [1.0, 0.98, 1.02, 1.0, 0.99, 1.01, 1.0]
    row = row_of([ours * d * n for d, n in zip(drift, noise)], [3.0 * d for d in drift])
    return {"machine": "M", "limits": MACHINE, "rows": [row]}


@pytest.mark.parametrize(
    ("new", "expected"), [(1.0, ""), (1.05, ""), (1.2, "regression"), (0.8, "improvement")]
)
def test_compare_finds_a_planted_change(tmp_path, capsys, new, expected):
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, ours in zip(files, (1.0, new)):
        path.write_text(json.dumps(run_of(ours)))
    ((name, old_gain, new_gain, verdict),) = compare.compare(run_of(1.0), run_of(new))
    assert name == "shape float32 forward wall clock"
    assert old_gain.median / new_gain.median == pytest.approx(new)
    assert verdict == expected
    assert command.main(["compare", *map(str, files)]) == (expected == "regression")
    assert f"{int(expected == 'regression')} regressions" in capsys.readouterr().out


def test_compare_ignores_a_change_within_the_spread():
    noisy = timing.Ratio(3.0, 2.0, 4.0)
    assert compare.verdict(noisy, timing.Ratio(2.4, 2.3, 2.5)) == ""
    assert compare.verdict(noisy, timing.Ratio(1.9, 1.8, 1.95)) == "regression"


def test_compare_says_when_machines_differ():
    text, regressed = compare.markdown(run_of(1.0), run_of(1.0) | {"machine": "N"})
    assert "Different machines: M and N." in text
    assert not regressed


# --- the command


def test_a_stopped_run_leaves_what_it_had(tmp_path, monkeypatch, capsys):
    """By Ctrl-C in the second row, and at the end of the first the file is there already."""
    file, measured = tmp_path / "some.json", suite.measure
    shapes = []

    def measure(shape, *rest):
        shapes.append(shape)
        if len(shapes) == 2:
            assert len(json.loads(file.read_text())["rows"]) == 1
            raise KeyboardInterrupt
        return measured(shape, *rest)

    monkeypatch.setattr(suite, "measure", measure)
    flags = ["--quick", "--repeats=1", "--device=cpu", "--dtype=fp32", "--pass=forward"]
    assert command.main([*flags, "--json", str(file)]) == 0
    result, said = json.loads(file.read_text()), capsys.readouterr()
    assert len(result["rows"]) == 1
    assert "scaling" not in result
    assert "stopped after 1 of " in said.out
    first, row, second, *_ = (line for line in said.err.splitlines() if line.startswith((" ", "[")))
    assert first.startswith("[1/")
    assert "wall clock: " in row
    assert "ours " in row
    assert "about 1 min left]" in second


def test_quick_run_writes_everything(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = [f"--{kind}={tmp_path / f'run.{kind}'}" for kind in ("json", "markdown")]
    flags = ["--quick", "--repeats=2", "--device=cpu", "--dtype", "bf16", "fp32"]
    assert cli.main(["bench", *flags, *out, f"--png={tmp_path}"]) == 0
    printed = capsys.readouterr()
    assert "No GPU" in printed.err
    assert (tmp_path / "run.markdown").read_text() in printed.out
    assert "### Scaling" in printed.out
    result = json.loads((tmp_path / "run.json").read_text())
    rows = {compare.key(row) for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 2 * 2 * 2
    for row in result["rows"]:
        assert "ours" in row["seconds"], row["left_out"]
        assert all("from fp64" not in why for why in row["left_out"].values())
    for picture in ("gains.png", "scaling.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_unknown_options_are_refused(capsys):
    for argv in (["bench", "--bogus"], ["info", "--bogus"]):
        with pytest.raises(SystemExit) as exit:
            cli.main(argv)
        assert exit.value.code == 2
        assert "--bogus" in capsys.readouterr().err


# --- a GPU that is not there


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


def test_a_gpu_is_chosen_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = command.options_of(command.parse([]))
    assert (options.device, options.clocks) == ("cuda", gpu.CLOCKS)
    assert command.options_of(command.parse(["--device=cpu"])).clocks == suite.CPU_CLOCKS


# --- end to end


def test_end_to_end_table():
    names = list(end_to_end.CONTENDERS)
    seconds = {n: [float(i + 1)] * 3 for i, n in enumerate(names)}
    sizes = {n: (i + 1) << 20 for i, n in enumerate(names) if n != "no adapter"}
    peak = {n: {"a step": (i + 1) << 20, "process": 5 << 20} for i, n in enumerate(names)}
    result = {"machine": "M", "dtype": "bf16", "repeats": 3, "step": seconds, "token": seconds}
    text = end_to_end.markdown(result | {"saved_bytes": sizes, "peak": peak})
    lines = text.splitlines()
    ours = ["ours", "1 s", "0.25 [0.25, 0.25]", "1 s", "0.20 [0.20, 0.20]", *["1 MiB"] * 2, "5 MiB"]
    assert f"| {' | '.join(ours)} |" in lines
    assert lines[-5:] == [
        "- step: 0.25 [0.25, 0.25] times PEFT's",
        "- step: the loop 3.00 [3.00, 3.00], dense stacked 2.00 [2.00, 2.00] times ours",
        "- token: 0.20 [0.20, 0.20] times the un-adapted model's",
        "- saved for backward: 0.333 times the loop's",
        "- peak memory, times PEFT's: a step 0.25, process 1.00",
    ]


def test_end_to_end_without_linux_or_with_one_part():
    text = end_to_end.markdown(
        {
            "machine": "M",
            "dtype": "fp32",
            "repeats": 3,
            "peak": dict.fromkeys(end_to_end.CONTENDERS),
        }
    )
    assert "peak" not in text
    seconds = {name: [1.0] for name in end_to_end.CONTENDERS}
    result = {"machine": "M", "dtype": "fp32", "repeats": 1, "token": seconds}
    assert "saved" not in end_to_end.markdown(result)


@pytest.mark.parametrize("tokens", [40, 1])
def test_modules_of_the_examples_compute_our_layer(tokens):
    """Loop and stacked as the demo and the end-to-end benchmark train them: outputs and gradients."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from examples.common import peers as modules

    E, r, alpha = modules.NUM_EXPERTS, modules.RANK, modules.ALPHA
    shape = Shape(tokens, 48, 32, E, r, modules.TOP_K)
    inputs = sample(shape, torch.float64)
    base = torch.nn.Linear(48, 32).double().requires_grad_(False)
    config = LoraMoeConfig(num_experts=E, r=r, top_k=modules.TOP_K, alpha=alpha)
    weights = inputs.a, inputs.b, inputs.router
    ours, loop, stacked = layers = [
        LoraMoeLinear(base, config),
        modules.LoopLoraMoe(base, *weights),
        modules.StackedLoraMoe(base, *weights),
    ]
    model = torch.nn.ModuleDict({"ours": ours, "loop": loop, "stacked": stacked})
    modules.set_weights(model, dict.fromkeys(model, weights))
    outputs = [layer(inputs.x) for layer in layers]
    for y in outputs:
        y.backward(inputs.dy)
    right = [outputs[0], *modules.gradients(model)["ours"]]
    for name, y in zip(("loop", "stacked"), outputs[1:]):
        assert entry.units([y, *modules.gradients(model)[name]], right, torch.float64) < 1000
    with torch.no_grad():  # the loop then skips idle experts
        assert entry.units([loop(inputs.x)], [outputs[0]], torch.float64) < 1000


@pytest.mark.parametrize(
    "name, sizes, peer",
    [
        (
            "experts",
            {"NAMES": {"gate_up_proj": (16, 16), "down_proj": (8, 16)}, "E": 4, "K": 2},
            "PEFT",
        ),
        (
            "ffn",
            {"NAMES": {"gate_proj": (16, 8), "up_proj": (16, 8), "down_proj": (8, 16)}},
            "mixlora",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_benchmarks_of_one_layer_run(name, sizes, peer, monkeypatch, capsys):
    """Every contender agrees with ours before it is timed."""
    pytest.importorskip(peer.lower())
    from benchmarks import ffn, native_experts, one_layer

    module = ffn if name == "ffn" else native_experts
    for key, value in ({"D": 16, "F": 8, "R": 2} | sizes).items():
        monkeypatch.setattr(module, key, value)
    monkeypatch.setattr(one_layer.timing, "SAMPLE_S", 0.0)
    monkeypatch.setattr(one_layer.machine, "describe", lambda: "a machine")
    assert command.main([name, "--tokens", "5", "--repeats", "1", "--fresh"]) == 0
    table = capsys.readouterr().out
    assert all(f"| {one} |" in table for one in ("ours", peer, "no adapter"))
    calls = module.contenders(5, torch.float32, "cpu")
    for tensor in calls[peer].trained:
        tensor.data.add_(1.0)
    with pytest.raises(SystemExit, match=f"{peer} differs from ours"):
        one_layer.check(calls, 1e-5)
