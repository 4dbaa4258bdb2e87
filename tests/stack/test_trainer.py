"""lora_moe.hf.LoraMoeTrainer: scale of the loss, accumulation, processes, warnings."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

from lora_moe import (
    injected,
    losses,
)
from lora_moe.hf import LoraMoeTrainer, LoraMoeTrainerMixin, private

from ..support.compare import relative_error
from ..support.models import tiny
from ..support.trainers import WEIGHTS, GradientsBeforeTheStep, arguments, told
from .processes.torchrun import run_to_the_end


def mean_loss(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return total / num_items_in_batch


def router_gradients(folder, batch, accumulation, kind, data, **experts):
    """Router gradients of only the auxiliary loss: experts with B = 0 give routers no task gradient."""
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
    """A custom compute_loss, as for class weights or distillation, that does not call super()."""

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
    """With B = 0 the model equals its base, and so do the losses, for any coefficients."""
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
    """DDP, even if the processes' batches have different numbers of tokens."""
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
    with pytest.raises(ValueError, match="a model with experts"):
        LoraMoeTrainer(tiny.base(), arguments(tmp_path), train_dataset=tiny.sequences(4))


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2  # as with two visible GPUs in one process
    with pytest.raises(ValueError, match="one GPU per process, got 2"):
        LoraMoeTrainer(tiny.model(), args, train_dataset=tiny.sequences(4))


def test_what_we_take_from_transformers_is_there():
    """Fails if a transformers version changes a private API used in lora_moe/hf/private.py."""
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
