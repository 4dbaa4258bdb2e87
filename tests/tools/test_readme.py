"""The README's examples run as printed, in order, and its links resolve."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from lora_moe import injected

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
FIRST, TRAINERS, PEFT = BLOCKS  # each has a test below


def ran(block, **scope):
    """The names that a block defines."""
    scope["__name__"] = "readme"
    exec(compile(block, "README.md", "exec", dont_inherit=True), scope)
    return scope


def test_first_steps(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    scope = ran(FIRST)
    gradients = [p.grad for p in scope["model"].parameters() if p.requires_grad]
    assert len(gradients) == 2 * 7 * 3 and all(g is not None for g in gradients)
    assert (tmp_path / "adapter" / "lora_moe.safetensors").is_file()


def test_trainers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    trl = pytest.importorskip("trl")
    from ..support.models import tiny

    model = tiny.model()
    before = [layer.lora_B.clone() for layer in injected(model).values()]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True
    )
    scope = ran(TRAINERS, model=model, args=args, data=tiny.sequences(8))
    assert issubclass(scope["MoeSFTTrainer"], trl.SFTTrainer)
    assert not any(
        torch.equal(layer.lora_B, b) for layer, b in zip(injected(model).values(), before)
    )


def test_peft():
    pytest.importorskip("peft")
    from ..support.models import tiny

    model = ran(PEFT, base=tiny.base())["model"]
    assert {n.split(".")[-1] for n in injected(model)} == {"q_proj", "v_proj"}


def test_vllm():
    from lora_moe.vllm.options import options_of

    command = shlex.split(re.search(r"^vllm serve .*$", TEXT, re.MULTILINE)[0])
    assert command[command.index("--load-format") + 1] == "lora_moe"
    options = json.loads(command[command.index("--additional-config") + 1])
    assert options_of(options) == {"adapter": "DIR"}


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target
