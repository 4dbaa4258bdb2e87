"""Trainer checkpoints with the adapter and the trainer's state, without base weights.

checkpoint-100/
    lora_moe.safetensors        experts, routers, modules_to_save
    router_history.json         expert load (see lora_moe.history)
    trainer_state.json, optimizer.pt, scheduler.pt, rng_state.pth, training_args.bin
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from .. import history, io

BASE_WEIGHTS = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


def is_adapter_only(directory) -> bool:
    """Whether a checkpoint has our file and, unlike a plain Trainer's, no base weights."""
    files = set(os.listdir(directory)) if directory and os.path.isdir(directory) else set()
    return io.FILE_NAME in files and not files.intersection(BASE_WEIGHTS)


def save(trainer, directory) -> None:
    """Save the adapter and the files that Trainer saves with a model; every process calls it."""
    io.save_adapter(trainer.model, directory)
    if not trainer.args.should_save:
        return
    processing = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    if processing is not None:
        processing.save_pretrained(directory)
    torch.save(trainer.args, Path(directory) / "training_args.bin")


def copy_adapter(source, target) -> None:
    """Copy the files that Trainer does not copy when it pushes a checkpoint."""
    for name in (io.FILE_NAME, history.FILE_NAME):
        if (Path(source) / name).is_file():
            shutil.copy(Path(source) / name, Path(target) / name)
