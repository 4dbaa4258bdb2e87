"""lora_moe.hf.LoraMoeTrainer: the loss's scale, checkpoints, metrics, groups, quantized bases."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_moe import (
    freeze_experts,
    injected,
    load_adapter,
    losses,
    router_stats,
    save_adapter,
)
from lora_moe.hf import LoraMoeTrainer, LoraMoeTrainerMixin, private
from lora_moe.history import FILE_NAME as HISTORY

from ..support.compare import relative_error
from ..support.models import tiny
from .processes.torchrun import run_to_the_end

WEIGHTS = {"model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"}


def arguments(folder, **fields):
    plain = {
        "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
    }  # fmt: skip
    return TrainingArguments(str(folder), **plain | fields)


class GradientsBeforeTheStep(TrainerCallback):
    """{name: gradient} of the first optimizer step."""

    def __init__(self):
        self.found = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.found is None:
            named = model.named_parameters()
            self.found = {n: p.grad.clone() for n, p in named if p.grad is not None}


# --- the auxiliary loss ----------------------------------------------------------------------------


def mean_loss(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return total / num_items_in_batch


def router_gradients(folder, batch, accumulation, kind, data, **experts):
    """Of the auxiliary loss alone: experts with B = 0 give the routers no gradient of the task."""
    model = tiny.model(**experts)
    model.accepts_loss_kwargs = kind != "without loss kwargs"
    gradients = GradientsBeforeTheStep()
    trainer = LoraMoeTrainer(
        model,
        arguments(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
        ),
        train_dataset=data,
        compute_loss_func=mean_loss if kind == "compute_loss_func" else None,
        callbacks=[gradients],
    )
    trainer.train()
    return {n: g for n, g in gradients.found.items() if "router" in n}, trainer


KINDS = ("with loss kwargs", "without loss kwargs", "compute_loss_func")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", ["equal lengths", "padding"])
def test_accumulation_does_not_change_the_router_gradient(tmp_path, kind, data):
    examples = tiny.padded(8) if data == "padding" else tiny.sequences(8)
    only_z = {"balance_coef": 0.0, "z_coef": 0.1}
    whole, _ = router_gradients(tmp_path, 8, 1, kind, examples, **only_z)
    for batch, accumulation in ((2, 4), (1, 8)):
        parts, _ = router_gradients(tmp_path, batch, accumulation, kind, examples, **only_z)
        for name, gradient in whole.items():
            assert gradient.any()
            assert relative_error(parts[name], gradient) < 1e-5, (name, batch)


def test_the_router_gradient_is_that_of_aux_loss(tmp_path):
    examples = tiny.padded(8)
    found, _ = router_gradients(tmp_path, 8, 1, "with loss kwargs", examples)
    model = tiny.model()
    batch = {k: torch.stack([e[k] for e in examples]) for k in examples[0]}
    model.train()(**batch)
    losses.aux_loss(model).backward()
    for name, layer in injected(model).items():
        got = found[f"{name}.router_weight"]
        assert relative_error(got, layer.router_weight.grad) < 1e-5


class OwnLoss:
    """As people weigh classes or distill: compute_loss without a call of super()."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OwnLossBelow(OwnLoss, LoraMoeTrainer):
    pass


class OwnLossAbove(LoraMoeTrainerMixin, OwnLoss, Trainer):
    pass


class ScaledLoss(LoraMoeTrainer):
    def compute_loss(self, *args, **kwargs):
        return 3 * super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("kind", [OwnLossBelow, OwnLossAbove, ScaledLoss])
def test_a_compute_loss_of_ones_own_gets_the_auxiliary_loss_once(tmp_path, kind):
    found, data = [], tiny.sequences(8)
    for trainer_class in (LoraMoeTrainer, kind):
        seen = GradientsBeforeTheStep()
        args = arguments(
            tmp_path, max_steps=1, max_grad_norm=0.0, gradient_accumulation_steps=2, logging_steps=1
        )
        trainer = trainer_class(tiny.model(), args, train_dataset=data, callbacks=[seen])
        trainer.train()
        found.append({n: g for n, g in seen.found.items() if "router" in n})
        assert "router/aux_loss" in trainer.state.log_history[0]
        assert "compute_loss" not in vars(trainer)
    for name, gradient in found[0].items():
        assert gradient.any()
        assert relative_error(found[1][name], gradient) < 1e-5


@pytest.mark.parametrize("name", ["router_learning_rate", "selection_bias_rate"])
@pytest.mark.parametrize("rate", [-1e-3, float("nan")])
def test_a_rate_that_would_climb_is_refused(tmp_path, name, rate):
    with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
        LoraMoeTrainer(tiny.model(), arguments(tmp_path), **{name: rate})


def test_the_last_step_of_an_epoch_with_fewer_micro_batches_counts_full(tmp_path):
    only_z = {"balance_coef": 0.0, "z_coef": 0.1}
    data = tiny.sequences(6)
    whole, _ = router_gradients(tmp_path, 6, 1, "without loss kwargs", data, **only_z)
    parts, _ = router_gradients(tmp_path, 2, 8, "without loss kwargs", data, **only_z)
    for name, gradient in whole.items():
        assert relative_error(parts[name], gradient) < 1e-5


def test_logged_losses_are_the_task_alone(tmp_path):
    """With B = 0 the model is its base, and so are the losses, whatever the coefficients."""
    data = tiny.sequences(8)
    logged = []
    for coefficient in (0.0, 1000.0):
        model = tiny.model(balance_coef=coefficient)
        trainer = LoraMoeTrainer(
            model, arguments(tmp_path, max_steps=1), train_dataset=data, eval_dataset=data
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        logged.append((before, trainer.state.log_history[0]["loss"]))
    assert logged[0] == logged[1]


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path):
    """DDP, also where the processes' batches have unequal numbers of tokens."""
    only_z = {"balance_coef": 0.0, "z_coef": 0.1}
    whole, _ = router_gradients(tmp_path, 8, 1, "with loss kwargs", tiny.padded(8), **only_z)
    torchrun("tests.stack.processes.trainer", tmp_path)
    parts = torch.load(tmp_path / "gradients.pt")
    for name, gradient in whole.items():
        assert relative_error(parts[f"module.{name}"], gradient) < 1e-5
    files = {p.name for p in (tmp_path / "ddp/checkpoint-2").iterdir()}
    assert "lora_moe.safetensors" in files and not files & WEIGHTS
    last = json.loads((tmp_path / "log.json").read_text())
    assert [entry["step"] for entry in last if "router/entropy" in entry] == [1, 2]


def torchrun(module, *args, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "-m", module, *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = run_to_the_end(command, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    data, found = tiny.sequences(4), []
    for fields in ({}, {private_checkpointing(): True}):
        gradients = GradientsBeforeTheStep()
        args = arguments(tmp_path, max_steps=1, **fields)
        model = tiny.model(trained=True)
        trainer = LoraMoeTrainer(model, args, train_dataset=data, callbacks=[gradients])
        trainer.train()
        found.append(gradients.found)
    assert getattr(args, private.checkpointing_kwargs(args)) == {"use_reentrant": False}
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def private_checkpointing():
    fields = TrainingArguments.__dataclass_fields__
    return next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in fields)


def test_bf16_base_with_a_small_rate_moves_every_row_of_a(tmp_path):
    model = tiny.model(trained=True).to(torch.bfloat16)
    for layer in injected(model).values():  # as inject makes them on a bf16 base
        layer.float().base_layer.bfloat16()
    before = {n: layer.lora_A.detach().clone() for n, layer in injected(model).items()}
    args = arguments(tmp_path, learning_rate=1e-5, bf16=True, max_steps=1)
    LoraMoeTrainer(model, args, train_dataset=tiny.sequences(4)).train()
    for name, layer in injected(model).items():
        assert layer.lora_A.dtype == torch.float32
        assert (layer.lora_A != before[name]).float().mean() > 0.99


# --- what a plain Trainer is told ------------------------------------------------------------------


def told(messages, word):
    return [str(m.message) for m in messages if word in str(m.message)]


def test_a_plain_trainer_that_leaves_the_auxiliary_loss_out_is_told_once(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = arguments(tmp_path, max_steps=5)
        Trainer(tiny.model(), args, train_dataset=tiny.sequences(20)).train()
    assert len(told(caught, "without aux_loss(model) in the loss")) == 1


def test_ours_tells_nothing(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LoraMoeTrainer(tiny.model(), arguments(tmp_path), train_dataset=tiny.sequences(8)).train()
    assert not told(caught, "lora_moe")


def test_prepare_model_for_kbit_training_after_inject_is_told(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(tiny.model(), use_gradient_checkpointing=False)
    model.enable_input_require_grads()
    model.lm_head.requires_grad_(True)
    with pytest.warns(UserWarning, match="every expert is frozen"):
        Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=tiny.sequences(4)).train()


def test_a_model_without_experts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LoraMoeLinear modules"):
        LoraMoeTrainer(tiny.base(), arguments(tmp_path), train_dataset=tiny.sequences(4))


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2  # as two visible GPUs in one process give
    with pytest.raises(ValueError, match="one GPU per process, got 2"):
        LoraMoeTrainer(tiny.model(), args, train_dataset=tiny.sequences(4))


# --- checkpoints -----------------------------------------------------------------------------------

STATEFUL = {
    "dropout": 0.2,
    "selection_bias": True,
    "router_bias": True,
    "modules_to_save": ["lm_head"],
}


def run(folder, steps, resume=None, **fields):
    """Six steps at most, saved at the third."""
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
    assert not best.endswith("checkpoint-4")  # such a rate makes it worse
    loaded = load_adapter(tiny.base(), best)
    batch = {"input_ids": torch.stack([e["input_ids"] for e in data[:2]])}
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, loaded.eval()(**batch).logits)


def test_a_full_checkpoint_of_a_plain_trainer_resumes(tmp_path):
    """Its weights; its optimizer has other parameter groups."""
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


# --- metrics ---------------------------------------------------------------------------------------


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


# --- the optimizer ---------------------------------------------------------------------------------


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


# --- quantised bases -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Trainer, LoraMoeTrainer])
def test_a_4_bit_base_trains(tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    from lora_moe import LoraMoeConfig, inject

    model = four_bit(tmp_path)
    args = arguments(tmp_path, max_steps=8)
    inject(model, LoraMoeConfig(**tiny.EXPERTS))
    trainer = kind(model, args, train_dataset=tiny.sequences(8))
    trainer.train()
    logged = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert logged[-1] < logged[0]
    assert all(layer.lora_A.dtype == torch.float32 for layer in injected(model).values())


def test_a_quantised_base_is_its_own_again(tmp_path):
    """Trainer refuses it before inject and after remove, and takes its copies in between."""
    pytest.importorskip("bitsandbytes")
    from lora_moe import LoraMoeConfig, inject, remove

    model, args = four_bit(tmp_path), arguments(tmp_path)
    own = model.hf_quantizer
    for _ in range(2):
        with pytest.raises(ValueError, match="purely quantized"):
            Trainer(model, args, train_dataset=tiny.sequences(8))
        inject(model, LoraMoeConfig(**tiny.EXPERTS))
        Trainer(copy.deepcopy(model), args, train_dataset=tiny.sequences(8))
        model.save_pretrained(tmp_path / "saved")
        assert model.hf_quantizer.quantization_config is own.quantization_config
        remove(model)
        assert model.hf_quantizer is own


def four_bit(folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.base(hidden_size=64, intermediate_size=64).save_pretrained(folder / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=config, device_map={"": "cpu"}
    )


@pytest.mark.parametrize("kind", [Trainer, LoraMoeTrainer])
def test_a_gguf_file_loads_and_trains(tmp_path, kind):
    pytest.importorskip("gguf")
    from lora_moe import LoraMoeConfig, inject

    from ..support.models.tiny_gguf import write_llama

    write_llama(tmp_path / "tiny.gguf", tiny.base(hidden_size=64, intermediate_size=64))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    if importlib.util.find_spec("transformers.quantizers.quantizer_gguf"):
        assert model.is_quantized  # what makes a Trainer refuse it without experts
    inject(model, LoraMoeConfig(**tiny.EXPERTS))
    trainer = kind(model, arguments(tmp_path), train_dataset=tiny.sequences(8))
    trainer.train()
    assert all(layer.lora_B.any() for layer in injected(model).values())


def test_a_quantisation_without_gradients_is_refused(tmp_path):
    model = tiny.model()
    model.is_quantized = True
    model.hf_quantizer = type("Q", (), {"is_trainable": False, "quantization_config": None})()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(24, 16, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match="quantization that gradients pass through"):
        LoraMoeTrainer(model, arguments(tmp_path), train_dataset=tiny.sequences(4))


# --- what is private -------------------------------------------------------------------------------


def test_what_we_take_from_transformers_is_there():
    """Fails with the version of transformers that moves one of these: lora_moe/hf/private.py says what."""
    import inspect

    from transformers.trainer_utils import validate_quantization_for_training

    for name in private.OVERRIDDEN:
        assert callable(getattr(Trainer, name)), name
    step = inspect.getsource(Trainer.training_step)
    assert "model_accepts_loss_kwargs" in step and "compute_loss_func" in step
    assert "current_gradient_accumulation_steps" in step
    assert ("loss_is_scaled_for_ga" in step) == hasattr(Trainer, "loss_is_scaled_for_ga")
    assert "is_qat_trainable" in inspect.getsource(validate_quantization_for_training)
    assert "get_batch_samples" in inspect.getsource(Trainer)
