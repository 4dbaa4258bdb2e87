"""lora_moe.hf.LoraMoeTrainer: resuming, the best model, contents of a folder."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainerCallback

from lora_moe import (
    freeze_experts,
    load_adapter,
    save_adapter,
)
from lora_moe.hf import LoraMoeTrainer
from lora_moe.history import FILE_NAME as HISTORY

from ..support.models import tiny
from ..support.trainers import WEIGHTS, arguments

STATEFUL = {
    "dropout": 0.2,
    "selection_bias": True,
    "router_bias": True,
    "modules_to_save": ["lm_head"],
}


def run(folder, steps, resume=None, **fields):
    """Trains for up to six steps, saving at the third; returns the trainer."""
    model = tiny.model(trained=True, **STATEFUL)
    freeze_experts(model, [1])
    args = arguments(
        folder,
        num_train_epochs=3,
        max_steps=-1,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,
        lr_scheduler_type="linear",
        **fields,
    )
    data = tiny.padded(16)
    stop = StopAt(steps)
    trainer = LoraMoeTrainer(
        model, args, train_dataset=data, callbacks=[stop], router_learning_rate=3e-2
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole", steps=6)
    run(tmp_path / "parts", steps=3)
    checkpoint = tmp_path / "parts/checkpoint-3"
    files = {p.name for p in checkpoint.iterdir()}
    assert {"lora_moe.safetensors", "optimizer.pt", "trainer_state.json", HISTORY} <= files
    assert not files & WEIGHTS
    resumed = run(tmp_path / "parts", steps=6, resume=True)
    assert resumed.state.global_step == 6
    want, got = whole.model.state_dict(), resumed.model.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    start = tiny.model(trained=True, **STATEFUL).state_dict()
    moved = [n for n, t in want.items() if not torch.equal(t, start[n])]
    assert any("selection_bias" in n for n in moved) and any("lm_head" in n for n in moved)
    losses_of = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses_of[0] == losses_of[1] and len(losses_of[0]) == 6
    assert resumed.router_monitor.history.steps == [1, 2, 3, 4, 5, 6]
    assert resumed.router_monitor.history.load_of == whole.router_monitor.history.load_of


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = tiny.model(trained=True)
    data = tiny.sequences(16)
    args = arguments(
        tmp_path,
        max_steps=4,
        learning_rate=0.3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer = LoraMoeTrainer(
        model, args, train_dataset=data, eval_dataset=tiny.sequences(8, seed=9)
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("checkpoint-4")  # such a high rate makes the model worse
    loaded = load_adapter(tiny.base(), best)
    batch = {"input_ids": torch.stack([e["input_ids"] for e in data[:2]])}
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, loaded.eval()(**batch).logits)


def test_a_full_checkpoint_of_a_plain_trainer_resumes(tmp_path):
    """The weights resume; the optimizer has different parameter groups."""
    data = tiny.sequences(16)
    fields = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    plain = Trainer(tiny.model(trained=True), arguments(tmp_path, **fields), train_dataset=data)
    plain.train()
    assert "model.safetensors" in os.listdir(tmp_path / "checkpoint-2")
    at_start = {}

    class Snapshot(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            at_start.update({n: p.detach().clone() for n, p in model.named_parameters()})

    args = arguments(tmp_path, **fields | {"max_steps": 3})
    other = tiny.model(seed=5)
    LoraMoeTrainer(other, args, train_dataset=data, callbacks=[Snapshot()]).train(
        resume_from_checkpoint=True
    )
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(at_start[name], parameter), name


def test_save_model_writes_the_adapter_and_the_tokenizer(tmp_path):
    model, words = tiny.model(trained=True), tiny.tokenizer()
    trainer = LoraMoeTrainer(
        model, arguments(tmp_path), train_dataset=tiny.sequences(4), processing_class=words
    )
    trainer.save_model(str(tmp_path / "final"))
    files = {p.name for p in (tmp_path / "final").iterdir()}
    assert {"lora_moe.safetensors", "tokenizer.json", "training_args.bin"} <= files
    assert not files & WEIGHTS and HISTORY not in files  # nothing was logged


def test_experts_on_a_tied_head_are_refused():
    from lora_moe import LoraMoeConfig, inject

    config = LoraMoeConfig(**tiny.EXPERTS | {"target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(ValueError, match=r"lm_head .*tied to that of model\.embed_tokens"):
        inject(tiny.base(tie_word_embeddings=True), config)


def test_experts_on_an_untied_head_save(tmp_path):
    model = tiny.model(target_modules=["q_proj", "lm_head"])
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    LoraMoeTrainer(model, args, train_dataset=tiny.sequences(4)).train()
    again = load_adapter(tiny.base(), tmp_path / "checkpoint-1")
    assert torch.equal(again.lm_head.lora_B, model.lm_head.lora_B)
    assert model.lm_head.lora_B.any()


def test_a_push_of_a_checkpoint_takes_the_adapter_along(tmp_path, monkeypatch):
    trainer = LoraMoeTrainer(tiny.model(), arguments(tmp_path), train_dataset=tiny.sequences(4))
    save_adapter(trainer.model, tmp_path / "checkpoint-1")
    pushed = []
    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda self, folder: pushed.append(folder)
    )
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert (tmp_path / "lora_moe.safetensors").is_file() and len(pushed) == 1
