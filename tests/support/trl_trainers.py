"""TRL's trainers with lora_moe.hf.LoraMoeTrainerMixin."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from datasets import Dataset

from .models import tiny
from .trainers import GradientsBeforeTheStep

PLAIN = {
    "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "report_to": [],
    "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
    "bf16": False,
}  # fmt: skip


def preferences(count=8):
    rows = tiny.texts(3 * count)
    names = ("prompt", "chosen", "rejected")
    return Dataset.from_dict(dict(zip(names, (rows[i::3] for i in range(3)))))


def numbers(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def aux_gradients(trainer_of, **fields):
    """Router gradients of the first step; experts with B = 0 give routers no task gradient."""
    gradients = GradientsBeforeTheStep()
    model = tiny.model(balance_coef=0.0, z_coef=0.1)
    trainer = trainer_of(model, [gradients], max_steps=1, max_grad_norm=0.0, **fields)
    trainer.train()
    return {n: g for n, g in gradients.found.items() if "router" in n}
