"""Inputs for MMoLRE."""

from __future__ import annotations

import dataclasses

import torch

from lora_moe import backend
from lora_moe.methods.mmolre import MMoLRE, MMoLREConfig, Task

WIDTH, LENGTHS = 10, (5, 3, 0)  # of three items; the last one is all padding
DTYPE = torch.float32 if backend.serving("cpu") == "triton" else torch.float64  # Triton has no fp64
LIMIT = {torch.float64: 1e-12, torch.float32: 2e-6}
CONFIG = MMoLREConfig(
    modalities={"text": 6, "audio": WIDTH, "image": 4},
    tasks={
        "sentiment": Task("mae"),
        "emotion": Task("multiclass", 5, 0.5),
        "tags": Task("multilabel", 3),
    },
    width=WIDTH,
    shared_ranks=(2, 3),
    task_rank=2,
)


def normal(*shape, seed=1, dtype=DTYPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_of(lengths, longest=None):
    return torch.arange(longest or max(lengths)) < torch.tensor(lengths)[:, None]


def batch(config=CONFIG, dtype=DTYPE, seed=0, items=4):
    g = torch.Generator().manual_seed(seed)
    lengths = {
        name: torch.randint(1, 7, (items,), generator=g).tolist() for name in config.modalities
    }
    masks = {name: mask_of(of, 7) for name, of in lengths.items()}
    features = {
        name: torch.randn(items, 7, size, generator=g, dtype=dtype)
        for name, size in config.modalities.items()
    }
    labels = {
        "sentiment": torch.randn(items, generator=g, dtype=dtype),
        "emotion": torch.randint(5, (items,), generator=g),
        "tags": torch.randint(2, (items, 3), generator=g).to(dtype),
    }
    return features, masks, labels


def model(dtype=DTYPE, **fields):
    torch.manual_seed(0)
    return MMoLRE(dataclasses.replace(CONFIG, **fields)).to(dtype)
