"""The benchmarks' sets, comparisons and commands; no test measures time."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import command, compare, end_to_end, suite, timing
from benchmarks import contenders as entry
from benchmarks.shapes import CLAIMS, SETS, Shape, sample
from lora_moe import LoraMoeConfig, LoraMoeLinear, cli


def row_of(ours, peer, **rest):
    seconds = {"ours": ours, "stacked": peer, "loop": [9.0] * 2, "plain LoRA": [0.1] * 7}
    facts = {"text": "shape", "dtype": "float32", "pass": "forward", "clock": "wall clock"}
    return facts | {"flops": 8e9, "bytes": 1e9, "seconds": seconds, "left_out": {}} | rest


MACHINE = {"gemm": {"float32": 2e9, "bfloat16": 8e9}, "bandwidth": 4e9}


def test_sets_cover_the_promised_shapes():
    assert len(CLAIMS) == 6
    shapes = SETS["all"]
    assert set(CLAIMS) < set(shapes)
    assert {1, 8192} <= {s.T for s in shapes}
    assert {4, 128} <= {s.E for s in shapes}
    assert {4, 64} <= {s.r for s in shapes}
    assert {1, 2, 4} <= {s.K for s in shapes}
    assert any(s.K == s.E for s in shapes)
    assert any(s.routing == "zipf" for s in shapes)
    assert len({str(s) for s in shapes}) == len(shapes)  # compare finds rows by name


def run_of(ours):
    """Seven turns with a spread of 4 % on a machine that drifts by 30 %."""
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


def test_a_stopped_run_keeps_its_results(tmp_path, monkeypatch, capsys):
    """Ctrl-C in the second row; the file is written after the first row already."""
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
    assert "No usable GPU found" in printed.err
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
    """Loop and stacked as in the demo and the end-to-end benchmark: outputs and gradients."""
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
    with torch.no_grad():  # without gradients the loop skips idle experts
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
    """Each contender is checked against ours before it is timed."""
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
