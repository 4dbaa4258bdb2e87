"""RouterMonitor, its history on disk and its plot."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, aux_loss, cli, inject, injected, save_adapter, use_routing
from lora_moe.history import FILE_NAME, MAX_STEPS, History
from lora_moe.monitor import RouterMonitor

CONFIG = LoraMoeConfig(num_experts=4, r=2, top_k=2, target_modules=["0", "2"], z_coef=0.1)


def model(**fields):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return inject(made, LoraMoeConfig(**CONFIG.to_dict() | fields))


def batches(count, tokens=40):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(tokens, 6, generator=g) for _ in range(count)]


@pytest.mark.parametrize("coefficient", [0.1, 0.0], ids=["balanced", "no auxiliary loss"])
def test_counts_every_micro_batch_without_padding(coefficient):
    made, want, entropy = model(z_coef=coefficient, balance_coef=0.0), {}, []
    monitor, mask = RouterMonitor(made), torch.arange(40) < 25
    for x in batches(3):
        with use_routing(made, mask=mask):
            made(x).sum().backward()
        monitor.update()
        monitor.update()  # no new forward has run
        for name, layer in injected(made).items():
            ids = layer.routing.indices[mask].flatten().long()
            want[name] = want.get(name, 0) + torch.bincount(ids, minlength=4)
            p = torch.softmax(layer.routing.logits[mask].double(), 1)
            entropy.append((-p * p.log()).sum(1).mean().item())
    numbers = monitor.summary(step=7)
    loads = {n: c / c.sum() for n, c in want.items()}
    assert all(int(c.sum()) == 3 * 25 * 2 for c in want.values())
    assert numbers["router/max_over_mean"] == pytest.approx(
        max(float(p.max()) * 4 for p in loads.values())
    )
    assert numbers["router/dead"] == sum(int((c == 0).sum()) for c in want.values())
    assert numbers["router/entropy"] == pytest.approx(sum(entropy[-2:]) / 2, rel=1e-5)
    assert monitor.history.steps == [7]
    for name, load in loads.items():
        assert monitor.history.load_of[name][0] == pytest.approx(load.tolist(), abs=1e-5)
    assert monitor.summary(step=8) == {}  # the counts were reset


def test_several_forwards_of_a_step_all_count():
    made = model()
    monitor = RouterMonitor(made)
    x, other = batches(2)
    y = made(x).sum() + made(other).sum()
    monitor.update(aux_loss(made))
    y.backward()
    assert int(monitor._stacked().sum()) == 2 * 2 * 40 * 2
    assert monitor.summary(1)["router/aux_loss"] > 0


def test_evaluation_does_not_count_as_training():
    made = model()
    monitor = RouterMonitor(made)
    x, other = batches(2)
    made(x).sum().backward()
    monitor.update()
    made.eval()
    with torch.no_grad():
        made(other)
    made.train()
    monitor.update()
    assert int(monitor._stacked().sum()) == 2 * 40 * 2


def test_processes_are_summed():
    made = model()
    monitor = RouterMonitor(made)
    made(batches(1)[0]).sum().backward()
    monitor.update()
    alone = monitor.history.load_of
    extra = torch.tensor([[1000, 0, 0, 0], [1000, 0, 0, 0]])
    monitor.summary(1, reduce=lambda counts: counts + extra)
    assert all(rows[0][0] > 0.9 for rows in alone.values())
    monitor.summary(2, reduce=lambda counts: counts + extra)  # no layer of this process has run
    assert all(rows[1] == [1, 0, 0, 0] for rows in alone.values())


def collapse(made):
    for layer in injected(made).values():
        nn.init.zeros_(layer.router_weight)
        nn.init.constant_(layer.router_bias, -9.0)
        with torch.no_grad():
            layer.router_bias[1:3] = 9.0


def test_a_collapse_warns_once_and_balance_never():
    made = model(router_bias=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = RouterMonitor(made)
        steps(made, monitor)
        assert not caught
        collapse(made)
        steps(made, monitor)
        steps(made, monitor)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "0, 2 (2 of 2 layers) collapsed: 2 of 4 experts" in text and "balance_coef" in text


def steps(made, monitor):
    for i, x in enumerate(batches(2)):
        loss = made(x).sum() + aux_loss(made)
        monitor.update()
        loss.backward()
        monitor.summary(len(monitor.history.steps) + i)


@pytest.mark.parametrize("case", ["every expert is picked", "few tokens", "task ids"])
def test_what_is_no_collapse(case):
    made = model(router_bias=True, **{"top_k": 4} if case == "every expert is picked" else {})
    collapse(made)
    monitor = RouterMonitor(made)
    x = batches(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if case == "task ids":
            with use_routing(made, task_ids=torch.ones(40, dtype=torch.long)):
                made(x).sum().backward()
        else:
            made(x[:4] if case == "few tokens" else x).sum().backward()
        monitor.update()
        monitor.summary(1)


# --- history ---------------------------------------------------------------------------------------


def history(steps=5, layers=3, experts=4, collapsed=False):
    made = History({f"layers.{i}.q_proj": experts for i in range(layers)})
    for t in range(steps):
        even = [1 / experts] * experts
        one = [1.0] + [0.0] * (experts - 1)
        made.append(t + 1, dict.fromkeys(made.experts, one if collapsed else even))
    return made


def test_history_travels(tmp_path):
    made = history()
    made.append(6, {"layers.0.q_proj": [0.7, 0.1, 0.1, 0.1]})  # the other layers did not run
    made.save(tmp_path)
    read = History.load(tmp_path)
    assert (read.experts, read.steps, read.load_of) == (made.experts, made.steps, made.load_of)
    assert read.load_of["layers.1.q_proj"][-1] == []
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_a_long_history_keeps_its_whole_course():
    made = history(steps=4 * MAX_STEPS, layers=1)
    assert len(made.steps) <= MAX_STEPS
    assert made.steps[0] == 1 and made.steps[-1] >= 4 * MAX_STEPS - 8
    assert all(len(rows) == len(made.steps) for rows in made.load_of.values())


def test_a_run_that_goes_back_rewrites_its_history():
    made = history(steps=5)
    made.append(3, {})
    assert made.steps == [1, 2, 3]


BAD = {
    "no JSON": "{",
    "a list": "[]",
    "another version": {"version": 2},
    "experts": {"experts": {"layers.0.q_proj": 0}},
    "too few rows": {"load": {"layers.0.q_proj": []}},
    "a row too wide": {"load": {"layers.0.q_proj": [[0.2] * 5]}},
    "a share beyond 1": {"load": {"layers.0.q_proj": [[2, 0, 0, 0]]}},
    "another layer": {"load": {"x": [[1, 0, 0, 0]]}},
    "NaN": '{"version": 1, "experts": {}, "steps": [NaN], "load": {}}',
    "steps": {"steps": ["1"]},
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_history_is_refused(tmp_path, case):
    history(steps=1, layers=1).save(tmp_path)
    path = tmp_path / FILE_NAME
    if isinstance(BAD[case], str):
        path.write_text(BAD[case])
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | BAD[case]))
    with pytest.raises(ValueError, match=FILE_NAME):
        History.load(tmp_path)


def test_a_missing_history(tmp_path):
    with pytest.raises(FileNotFoundError, match=FILE_NAME):
        History.load(tmp_path)
    monitor = RouterMonitor(model())
    monitor.load(tmp_path)  # a checkpoint without a history: nothing to resume
    assert monitor.history.steps == []


# --- the plot --------------------------------------------------------------------------------------


def share_of(path, color):
    """The share of pixels close to a color."""
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    return float((abs(pixels - torch.tensor(color).numpy()).max(-1) < 0.06).mean())


WHITE, DARK, RED = (0.97, 0.97, 0.97), (0.01, 0.06, 0.15), (0.73, 0.16, 0.20)


def test_the_picture_shows_balance_and_collapse(tmp_path):
    pytest.importorskip("matplotlib")
    from lora_moe.heatmap import draw

    draw(history(experts=8), tmp_path / "even.png")
    draw(history(experts=8, collapsed=True), tmp_path / "one.png")
    assert share_of(tmp_path / "even.png", DARK) < 0.02
    assert share_of(tmp_path / "one.png", DARK) > 0.3  # seven of eight experts are dead
    assert share_of(tmp_path / "one.png", RED) > 0.03


@pytest.mark.parametrize(
    "layers, experts", [(1, 2), (90, 8), (3, 40)], ids=["one", "many layers", "many experts"]
)
def test_pictures_of_every_size(tmp_path, layers, experts):
    pytest.importorskip("matplotlib")
    from lora_moe.heatmap import draw

    made = history(steps=1, layers=layers, experts=experts)
    made.append(2, {"layers.0.q_proj": [1 / experts] * experts})
    path = draw(made, tmp_path / "x.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one step"):
        draw(History({"a": 2}), path)


def test_inspect_draws_it(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    save_adapter(model(), tmp_path)
    png = tmp_path / "load.png"
    assert cli.main(["inspect", str(tmp_path), "--png", str(png)]) == 1
    assert FILE_NAME in capsys.readouterr().err
    history().save(tmp_path)
    assert cli.main(["inspect", str(tmp_path), "--png", str(png)]) == 0
    assert str(png) in capsys.readouterr().out and png.is_file()


def test_entropy_is_that_of_the_last_forward_in_nats():
    made = model()
    for layer in injected(made).values():
        nn.init.zeros_(layer.router_weight)
    monitor = RouterMonitor(made)
    made(batches(1)[0]).sum().backward()
    monitor.update()
    assert monitor.summary(1)["router/entropy"] == pytest.approx(math.log(4))
