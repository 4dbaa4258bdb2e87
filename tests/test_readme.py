"""The README's examples run as printed, and all links resolve."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_first_example(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(BLOCKS[0], scope)
    gradients = [p.grad for p in scope["model"].parameters() if p.requires_grad]
    assert len(gradients) == 2 * 3 * 3 and all(g is not None for g in gradients)
    assert (tmp_path / "adapter" / "lora_moe.safetensors").is_file()


def test_functions_example():
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (6, 12), "router_weight": (8, 12), "lora_A": (64, 12), "lora_B": (64, 5)}
    scope = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    scope |= {"linear": torch.nn.Linear(12, 5), "task_ids": torch.tensor([0, 1, -1, 7, 0, 3])}
    exec(BLOCKS[1], scope)
    assert not scope["y"][2].any() and scope["y"][3].any()
    assert scope["routing"].indices.shape == (6, 2)


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target
