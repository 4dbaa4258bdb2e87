"""Trainer for models with experts: auxiliary loss, adapter-only checkpoints, router metrics.

An optimizer step of M micro-batches (over all processes) minimizes

    task loss as Trainer scales it  +  sum over m of  share_m * aux_loss_m,   shares by tokens, sum 1

so batch size, accumulation and padding do not change the strength of the auxiliary loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..io import load_adapter
from ..losses import aux_loss, update_selection_bias
from ..monitor import RouterMonitor
from ..steering import injected, layers_of
from . import checkpoints, private
from .accumulation import Shares
from .reference import Reference


class LoraMoeTrainerMixin:
    """A mixin for any Trainer: `class MoeSFTTrainer(LoraMoeTrainerMixin, trl.SFTTrainer): pass`.

    The model must have experts (from lora_moe.inject, or load_adapter to continue).  Changes to the
    Trainer:

    - aux_loss(model) trains the routers with the same strength for every batch size, gradient
      accumulation, padding and number of processes.  The logged `loss` is the task loss alone.
    - Checkpoints have lora_moe.safetensors and the trainer's state, no base weights; resume_from_checkpoint
      and load_best_model_at_end read them.  A PeftModel is saved by PEFT as usual.
    - router/max_over_mean, router/entropy, router/dead and router/aux_loss are in every log, with the prefix
      eval_ in evaluation logs (see lora_moe.monitor), and a collapse is reported once.
    - Weight decay does not apply to routers, and selection biases are updated after each optimizer step.
    - A quantized or GGUF base is accepted, and trainable parameters keep their dtype.
    - Activation checkpointing uses use_reentrant=False unless you set it.
    - TRL's DPO, GRPO, KTO and RLOO use the initial model as their reference, through disable_adapters if
      experts are fresh, without a second model.

    Args:
        *args, **kwargs: arguments of the Trainer.
        router_learning_rate: learning rate of the routers; by default that of the other parameters.
        router_metrics: log router metrics, and write router_history.json next to each saved adapter.
        router_heatmap: also draw router_history.png there (needs matplotlib).
        selection_bias_rate: rate of update_selection_bias, for layers with selection_bias=True.
    Raises:
        ValueError: if the model has no experts; with several GPUs in one process (nn.DataParallel), a
            quantization without gradients, a negative rate, or router_learning_rate and a custom optimizer.
    """

    # attributes of the Trainer
    model: nn.Module
    args: TrainingArguments
    accelerator: Accelerator
    add_callback: Callable[[TrainerCallback], None]

    def __init__(
        self,
        *args,
        router_learning_rate: float | None = None,
        router_metrics: bool = True,
        router_heatmap: bool = False,
        selection_bias_rate: float = 0.001,
        **kwargs,
    ):
        rates = {"router_learning_rate": router_learning_rate or 0.0}
        rates["selection_bias_rate"] = selection_bias_rate
        for name, rate in rates.items():
            if not 0 <= rate < float("inf"):
                raise ValueError(f"{name}: expected a finite number of at least 0, got {rate}")
        model = args[0] if args else kwargs.get("model")
        private.expect_gradients(model)
        with private.keeps_dtypes(model), private.references_made_by(self._reference, type(self)):
            super().__init__(*args, **kwargs)
        layers = layers_of(self.model).values()
        self._expect_supported()
        self.router_learning_rate = router_learning_rate
        self.router_monitor = self.eval_router_monitor = None
        if router_metrics:
            self._watch(self.model)
        self.router_heatmap = router_heatmap
        self._balances = any(layer.config.has_aux_loss for layer in layers)
        self._shares, self._share = Shares(self.accelerator), 1.0
        if any(layer.selection_bias is not None for layer in layers):
            self.add_callback(_MoveSelectionBias(selection_bias_rate))
        name = private.checkpointing_kwargs(self.args)
        if private.checkpoints_activations(self.args):
            setattr(self.args, name, {"use_reentrant": False} | (getattr(self.args, name) or {}))

    def _watch(self, model):
        self.router_monitor, self.eval_router_monitor = (
            RouterMonitor(model),
            RouterMonitor(model, None),
        )

    def call_model_init(self, trial=None):
        """As in Trainer; each trial of a hyperparameter search has a new model to monitor."""
        model = super().call_model_init(trial)
        if getattr(self, "router_monitor", None) is not None:
            self._watch(model)
        return model

    def _expect_supported(self):
        if self.args.n_gpu > 1:
            raise ValueError(
                f"args: expected one GPU per process, got {self.args.n_gpu}, for which Trainer uses"
                " nn.DataParallel; start with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES"
            )
        reference = getattr(self, "ref_model", None)
        if getattr(self.args, "sync_ref_model", False) and isinstance(reference, Reference):
            raise ValueError(
                "sync_ref_model: expected False, because the reference shares the policy's base and has"
                " no weights; alternatively, pass a ref_model"
            )

    def _reference(self, source):
        """The reference instead of TRL's second model from an id or a policy; None lets TRL create it."""
        policy = source if isinstance(source, nn.Module) else getattr(self, "model", None)
        if policy is None or is_peft_model(policy) or not injected(policy):
            return None
        return Reference(policy)

    # --- the loss ----------------------------------------------------------------------------------

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if self._balances:
            across = getattr(self.args, "average_tokens_across_devices", False)
            self._shares.begin_step(batches, over_processes=across)
        return batches, num_items

    def training_step(self, model, inputs, *args, **kwargs):
        self._share = self._shares.of(inputs)
        with private.outermost_loss(self, self._with_aux):
            return super().training_step(model, inputs, *args, **kwargs)

    def _with_aux(self, result, num_items_in_batch):
        """The result of compute_loss, including a subclass's, with the gradient of aux_loss added."""
        if not self.model.training:
            return result
        loss, *outputs = result if isinstance(result, tuple) else (result,)
        aux = aux_loss(self.model) if self._balances else None
        if self.router_monitor is not None:
            self.router_monitor.update(aux)
        if aux is not None:
            loss = loss + self._without_value(aux, num_items_in_batch).to(loss.device)
        return (loss, *outputs) if outputs else loss

    def _without_value(self, aux, num_items_in_batch):
        """Zero, with the gradient of this micro-batch's share of the auxiliary loss."""
        weight = self._share
        if private.divides_loss(self, num_items_in_batch):
            weight = weight * self.current_gradient_accumulation_steps
        return weight * (aux - aux.detach())

    def prediction_step(self, *args, **kwargs):
        result = super().prediction_step(*args, **kwargs)
        if self.eval_router_monitor is not None:
            self.eval_router_monitor.update()
        return result

    # --- metrics -----------------------------------------------------------------------------------

    def log(self, logs, *args, **kwargs):
        if self.router_monitor is not None:
            logs.update(self._router_metrics(logs))
        return super().log(logs, *args, **kwargs)

    def _router_metrics(self, logs):
        """Metrics for Trainer's logs: a training log has a loss, an evaluation log a runtime."""
        step = self.state.global_step
        several = self.accelerator.num_processes > 1
        reduce = (lambda t: self.accelerator.reduce(t, "sum")) if several else None
        if "loss" in logs:
            return self.router_monitor.summary(step, reduce)
        prefix = next((k[: -len("_runtime")] for k in logs if k.endswith("_runtime")), "train")
        if prefix == "train":
            return {}
        numbers = self.eval_router_monitor.summary(step, reduce)
        return {f"{prefix}_{name}": value for name, value in numbers.items()}

    # --- the optimizer -----------------------------------------------------------------------------

    def get_decay_parameter_names(self, model):
        """As in Trainer, without routers."""
        routers = _routers(model)
        named = dict(model.named_parameters())
        return [n for n in super().get_decay_parameter_names(model) if named.get(n) not in routers]

    def create_optimizer(self, *args, **kwargs):
        given, rate = self.optimizer is not None, self.router_learning_rate
        optimizer = super().create_optimizer(*args, **kwargs)
        if rate is not None and not getattr(self, "_router_group", False):
            if given:
                raise ValueError(
                    "router_learning_rate: expected None with optimizers=, got"
                    f" {rate}; give the routers their own parameter group"
                )
            _own_group(
                optimizer, _routers(args[0] if args and args[0] is not None else self.model), rate
            )
            self._router_group = True
        return optimizer

    # --- checkpoints -------------------------------------------------------------------------------

    def save_model(self, output_dir=None, _internal_call=False):
        """Write the adapter and its other files to output_dir (args.output_dir by default)."""
        directory = self.args.output_dir if output_dir is None else output_dir
        if is_peft_model(self.model):
            super().save_model(output_dir, _internal_call)
        else:
            checkpoints.save(self, directory)
        if self.router_monitor is not None and self.args.should_save:
            self.router_monitor.save(directory)
            if self.router_heatmap and self.router_monitor.history.steps:
                self._draw(directory)
        pushes = self.args.push_to_hub and not _internal_call and not is_peft_model(self.model)
        if pushes:
            self.push_to_hub(commit_message="Model save")

    def _draw(self, directory):
        from ..heatmap import draw

        draw(self.router_monitor.history, f"{directory}/router_history.png")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.router_monitor is not None:
            self.router_monitor.load(resume_from_checkpoint)
        if not checkpoints.is_adapter_only(resume_from_checkpoint):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return load_adapter(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        if not checkpoints.is_adapter_only(best):
            return super()._load_best_model()
        return load_adapter(self.model, best)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.is_world_process_zero():
            checkpoints.copy_adapter(checkpoint_folder, self.args.output_dir)
        return super()._push_from_checkpoint(checkpoint_folder)


class LoraMoeTrainer(LoraMoeTrainerMixin, Trainer):
    """transformers' Trainer for a model with experts; see LoraMoeTrainerMixin.

    >>> lora_moe.inject(model, config)
    >>> trainer = LoraMoeTrainer(model, TrainingArguments("out"), train_dataset=data)
    >>> trainer.train()
    >>> trainer.save_model()              # out/lora_moe.safetensors, for lora_moe.load_adapter
    """


class _MoveSelectionBias(TrainerCallback):
    def __init__(self, rate):
        self.rate = rate

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        update_selection_bias(model, self.rate)


def _routers(model: nn.Module) -> set[nn.Parameter]:
    found = set()
    for layer in injected(model).values():
        found |= set(layer.router_parameters())
    return found


def _own_group(optimizer: torch.optim.Optimizer, routers: set, rate: float) -> None:
    """Move the routers to a group with this learning rate and no decay."""
    moved = [p for group in optimizer.param_groups for p in group["params"] if p in routers]
    if not moved:
        raise ValueError("router_learning_rate: expected trainable routers, got none")
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in routers]
    optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]
    optimizer.add_param_group(options | {"params": moved, "lr": rate, "weight_decay": 0.0})
