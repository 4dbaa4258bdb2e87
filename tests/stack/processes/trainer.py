"""Run by torchrun: a LoraMoeTrainer on two processes with unequal numbers of tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from lora_moe.hf import LoraMoeTrainer

from ...support.models import tiny
from ...support.trainers import GradientsBeforeTheStep, arguments


def main(folder: Path) -> None:
    gradients = GradientsBeforeTheStep()
    args = arguments(
        folder / "ddp",
        ddp_backend="gloo",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    model = tiny.model(balance_coef=0.0, z_coef=0.1)
    trainer = LoraMoeTrainer(model, args, train_dataset=tiny.padded(8), callbacks=[gradients])
    trainer.train()
    found = {
        f"module.{n}".replace("module.module.", "module."): g for n, g in gradients.found.items()
    }
    if trainer.is_world_process_zero():
        torch.save(found, folder / "gradients.pt")
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
