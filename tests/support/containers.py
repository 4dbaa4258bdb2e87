"""Tensors and metadata in a safetensors container."""

from __future__ import annotations

import torch

from lora_moe import safefile

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b.c": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "d": torch.tensor([[0.1]], dtype=torch.float64),
    "e": torch.tensor([3.0], dtype=torch.float16),
    "empty": torch.zeros(0, 4),
}
METADATA = {"format": "pt", "note": "ü"}


def read_all(path):
    with safefile.open_regular(path) as file:
        metadata, slices = safefile.read_header(file)
        return metadata, {key: safefile.read_tensor(file, s) for key, s in slices.items()}


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key
