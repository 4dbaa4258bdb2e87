"""Layers that mix experts once per sample, compiled for a fixed and for a dynamic batch size."""

from __future__ import annotations

import pytest
import torch

from lora_moe import plan, use_routing

from .test_per_sample import D_IN, DTYPE, NEAR, B, L, N, made


@pytest.mark.parametrize("name", ["poly", "mtl_lora", "sequence"])
def test_compiled_for_one_batch_size_and_for_any(name, monkeypatch):
    monkeypatch.setattr(plan, "mixes", lambda *shape: True)
    layer, x = made(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (B, 2, 4, 5):
        x = torch.randn(rows, L, D_IN, dtype=DTYPE, requires_grad=True)
        tasks = torch.arange(rows) % N if layer.config.num_tasks else None
        with use_routing(layer, task_ids=tasks, mask=torch.ones(rows, L)):
            want, got = layer(x), compiled(x)
        torch.testing.assert_close(got, want, **NEAR)
        (dx,), (truth,) = (torch.autograd.grad(y.square().sum(), x) for y in (got, want))
        torch.testing.assert_close(dx, truth, **NEAR)


def test_a_dynamic_batch_size(monkeypatch):
    """Mixing would make the number of LoRAs a constant of the graph."""
    monkeypatch.setattr(plan, "mixes", lambda *shape: True)
    layer, x = made("sequence")
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), **NEAR)
