"""lora_moe.hf.LoraMoeTrainer: router metrics, and the routers' learning rate and weight decay."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from lora_moe import (
    injected,
    load_adapter,
    router_stats,
)
from lora_moe.hf import LoraMoeTrainer
from lora_moe.history import FILE_NAME as HISTORY

from ..support.models import tiny
from ..support.trainers import arguments


def test_router_metrics_reach_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    data = tiny.sequences(8)
    args = arguments(
        tmp_path, report_to=["tensorboard"], eval_strategy="steps", eval_steps=2, max_steps=4
    )
    trainer = LoraMoeTrainer(tiny.model(), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    for name in ("max_over_mean", "entropy", "dead", "aux_loss"):
        key = f"router/{name}"
        want = [(e["step"], e[key]) for e in trainer.state.log_history if key in e]
        got = [(e.step, e.value) for e in events.Scalars(f"train/{key}")]
        assert len(want) == 4 and want == [(s, pytest.approx(v, rel=1e-6)) for s, v in got]
    assert len(events.Scalars("eval/router/max_over_mean")) == 2


def test_training_statistics_stay_apart_from_those_of_evaluation(tmp_path):
    trainer = LoraMoeTrainer(
        tiny.model(trained=True),
        arguments(tmp_path),
        train_dataset=tiny.sequences(8),
        eval_dataset=tiny.sequences(4, seed=7),
    )
    trainer.train()
    before = router_stats(trainer.model, training=True)
    metrics = trainer.evaluate()
    after = router_stats(trainer.model, training=True)
    assert all(torch.equal(before[n]["load"], after[n]["load"]) for n in before)
    evaluated = router_stats(trainer.model, training=False)
    worst = max(stats["max_over_mean"] for stats in evaluated.values())
    assert metrics["eval_router/max_over_mean"] == pytest.approx(worst)
    trained = max(stats["max_over_mean"] for stats in after.values())
    assert worst != trained


def test_metrics_can_be_left_out(tmp_path):
    trainer = LoraMoeTrainer(
        tiny.model(), arguments(tmp_path), train_dataset=tiny.sequences(8), router_metrics=False
    )
    trainer.train()
    trainer.save_model()
    assert not any("router" in key for entry in trainer.state.log_history for key in entry)
    assert not (tmp_path / HISTORY).exists()


def test_the_heat_map_lies_beside_the_adapter(tmp_path):
    pytest.importorskip("matplotlib")
    trainer = LoraMoeTrainer(
        tiny.model(), arguments(tmp_path), train_dataset=tiny.sequences(8), router_heatmap=True
    )
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "router_history.png").read_bytes().startswith(b"\x89PNG")


def test_every_model_of_model_init_is_watched(tmp_path):
    trainer = LoraMoeTrainer(
        None, arguments(tmp_path), train_dataset=tiny.sequences(8), model_init=lambda: tiny.model()
    )
    first = trainer.model
    for _ in range(2):  # as hyperparameter_search does
        trainer.model = trainer.model_wrapped = trainer.call_model_init()
        trainer.optimizer = None
        trainer.train()
        steps = [e["step"] for e in trainer.state.log_history if "router/entropy" in e]
        assert steps == [1, 2]
    assert trainer.model is not first


def test_metrics_of_a_compiled_model(tmp_path):
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    plain, compiled = tiny.model(trained=True), tiny.model(trained=True)
    logs = []
    for model, given in ((plain, arguments(tmp_path)), (compiled, args)):
        trainer = LoraMoeTrainer(model, given, train_dataset=tiny.sequences(8))
        trainer.train()
        logs.append([e for e in trainer.state.log_history if "loss" in e])
    for name in ("loss", "router/max_over_mean", "router/aux_loss", "router/entropy"):
        assert [e[name] for e in logs[1]] == pytest.approx([e[name] for e in logs[0]], rel=1e-5)
    saved = tmp_path / "compiled"
    trainer.save_model(str(saved))
    load_adapter(tiny.base(), saved)


def test_routers_have_no_decay_and_a_rate_of_their_own(tmp_path):
    model = tiny.model(router_bias=True)
    args = arguments(tmp_path, weight_decay=0.1, learning_rate=1e-3)
    trainer = LoraMoeTrainer(
        model, args, train_dataset=tiny.sequences(4), router_learning_rate=5e-2
    )
    optimizer = trainer.create_optimizer()
    of = {p: g for g in optimizer.param_groups for p in g["params"]}
    assert len(of) == sum(len(g["params"]) for g in optimizer.param_groups)  # each once
    assert set(of) == {p for p in model.parameters() if p.requires_grad}
    for layer in injected(model).values():
        for router in (layer.router_weight, layer.router_bias):
            assert (of[router]["lr"], of[router]["weight_decay"]) == (5e-2, 0.0)
        for matrix in (layer.lora_A, layer.lora_B):
            assert (of[matrix]["lr"], of[matrix]["weight_decay"]) == (1e-3, 0.1)


def test_routers_have_no_decay_without_a_rate(tmp_path):
    model = tiny.model()
    args = arguments(tmp_path, weight_decay=0.1)
    optimizer = LoraMoeTrainer(model, args, train_dataset=tiny.sequences(4)).create_optimizer()
    decayed = {p for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    layers = injected(model).values()
    assert decayed == {p for layer in layers for p in (layer.lora_A, layer.lora_B)}


def test_a_router_rate_beside_an_optimizer_of_ones_own_is_refused(tmp_path):
    model = tiny.model()
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = LoraMoeTrainer(
        model,
        arguments(tmp_path),
        train_dataset=tiny.sequences(4),
        optimizers=(own, None),
        router_learning_rate=1.0,
    )
    with pytest.raises(ValueError, match="router_learning_rate: expected None with optimizers="):
        trainer.train()
