"""The code of docs/c_lorae.md as printed, on batches that lack tasks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

TEXT = (Path(__file__).parents[2] / "docs/c_lorae.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_the_pages_code_runs_and_is_short(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    task = torch.arange(6) % 3
    ids, labels = torch.randint(3, 60, (6, 9)), torch.randint(3, 60, (6, 4))
    metrics = {"entities": 0.5, "relations": 0.1, "events": 0.3}
    images = torch.randn(6, 4, 12)
    whole = task, ids, images, labels
    without = [[given[task != t] for given in whole] for t in range(3)]  # as in real batches
    scope = {
        "batches": [whole, *without] * 25 + [whole],
        "evaluate": lambda model: metrics,
    }
    exec(BLOCKS[0], scope)
    assert len(BLOCKS[0].splitlines()) < 30
    assert (tmp_path / "adapter" / "c_lorae.safetensors").is_file()
    weights = scope["loss_of"].weights()
    assert weights[1] == weights.max()
    assert scope["each"].mean() < 0.5 * torch.tensor(64).log()
    exec(BLOCKS[1], scope)
    assert scope["said"].malformed == 1
    assert scope["score"] == pytest.approx((1 / 2, 1, 2 / 3))
