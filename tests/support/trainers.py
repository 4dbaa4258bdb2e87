"""Arguments of a short training run, and callbacks that record it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import TrainerCallback, TrainingArguments

from .models import tiny

WEIGHTS = {"model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"}


def arguments(folder, **fields):
    plain = {
        "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
    }  # fmt: skip
    return TrainingArguments(str(folder), **plain | fields)


class GradientsBeforeTheStep(TrainerCallback):
    """Records {name: gradient} of the first optimizer step."""

    def __init__(self):
        self.found = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.found is None:
            named = model.named_parameters()
            self.found = {n: p.grad.clone() for n, p in named if p.grad is not None}


def told(messages, word):
    return [str(m.message) for m in messages if word in str(m.message)]


def four_bit(folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny.base(hidden_size=64, intermediate_size=64).save_pretrained(folder / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=config, device_map={"": "cpu"}
    )
