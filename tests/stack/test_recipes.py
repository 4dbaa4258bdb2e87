"""The recipes in docs/recipes.md run as printed, with a tiny model in place of the one they name."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from lora_moe import LoraMoeConfig, disable_adapters, inject, load_adapter, save_adapter

from ..support.models import tiny
from .processes.torchrun import run_to_the_end

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/recipes.md").read_text()
RECIPES = dict(
    re.findall(r"^<!-- examples/recipes/(\w+)\.py -->\n```python\n(.*?)^```", TEXT, re.M | re.S)
)
NAMED = "HuggingFaceTB/SmolLM2-135M"
NEEDS = {
    "trainer": ("transformers", "accelerate", "tensorboard", "matplotlib"),
    "sft": ("trl",),
    "dpo": ("trl",),
    "grpo": ("trl",),
    "fsdp2": ("accelerate", "transformers"),
    "qlora": ("trl", "bitsandbytes"),
    "lit": ("lightning", "transformers"),
    "harness": ("lm_eval", "datasets", "transformers"),
}


def test_every_recipe_is_short_and_is_the_file_in_examples():
    files = {path.stem: path.read_text() for path in (ROOT / "examples/recipes").glob("*.py")}
    assert files == RECIPES and RECIPES.keys() == NEEDS.keys()
    for name, code in RECIPES.items():
        assert len([line for line in code.splitlines() if line.strip()]) < 30, name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder as from the Hub, with a tiny decoder and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny.base(hidden_size=64, intermediate_size=64, eos_token_id=None).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def recipe(name, base):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    assert RECIPES[name].count(NAMED) == 1
    return RECIPES[name].replace(NAMED, str(base))


def run(name, base, folder, monkeypatch):
    """Runs a recipe in the folder; returns its global variables."""
    monkeypatch.chdir(folder)
    scope = {"__name__": "__main__"}
    exec(compile(recipe(name, base), f"{name}.py", "exec"), scope)
    return scope


def expect_trained(base, directory):
    """The adapter loads into the base, and its experts have changed."""
    from transformers import AutoModelForCausalLM

    model = load_adapter(AutoModelForCausalLM.from_pretrained(base), directory)
    matrices = [p for name, p in model.named_parameters() if name.endswith("lora_B")]
    assert len(matrices) == 2 * 7 and all(bool(p.any()) for p in matrices)
    with torch.no_grad():
        assert model(input_ids=torch.arange(3, 11)[None]).logits.isfinite().all()


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "qlora"])
def test_recipe_with_trl(name, base, tmp_path, monkeypatch):
    log = run(name, base, tmp_path, monkeypatch)["trainer"].state.log_history
    assert all("router/max_over_mean" in entry for entry in log if "loss" in entry)
    expect_trained(base, tmp_path / "out" / name)


def test_recipe_with_trainer(base, tmp_path, monkeypatch):
    run("trainer", base, tmp_path, monkeypatch)
    out = tmp_path / "out/trainer"
    assert {"checkpoint-4", "checkpoint-8", "router_history.png"} <= set(os.listdir(out))
    assert list(out.rglob("events.out.tfevents.*"))
    expect_trained(base, out)


def test_recipe_with_lightning(base, tmp_path, monkeypatch):
    trainer = run("lit", base, tmp_path, monkeypatch)["trainer"]
    assert trainer.global_step == 4 and "router/entropy" in trainer.logged_metrics
    expect_trained(base, tmp_path / "out/lit")


def test_recipe_with_lm_eval(base, tmp_path, monkeypatch):
    code = recipe("harness", base)
    import datasets
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    config = LoraMoeConfig(num_experts=4, r=4, top_k=2, target_modules="all-linear")
    model = inject(AutoModelForCausalLM.from_pretrained(base), config).eval()
    tiny.train_by_hand(model)
    save_adapter(model, tmp_path / "out/trainer")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "harness.py", "exec"), scope := {"__name__": "__main__"})

    def accuracy():
        right = [
            picked(model, row["text"], row["choices"]) == row["answer"] for row in scope["rows"]
        ]
        return sum(right) / len(right)

    assert scope["with_experts"]["next_word"]["acc,none"] == accuracy()
    with disable_adapters(model):
        assert scope["without"]["next_word"]["acc,none"] == accuracy()


@torch.no_grad()
def picked(model, text, choices):
    """Index of the single-token choice that is likeliest after the text."""
    tokenizer = tiny.tokenizer()
    logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    return int(logits[tokenizer.convert_tokens_to_ids(choices)].argmax())


def test_recipe_with_fsdp2_by_torchrun(base, tmp_path):
    (tmp_path / "fsdp2.py").write_text(recipe("fsdp2", base))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    done = run_to_the_end([*command, "fsdp2.py"], cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert len(losses) == 4  # 32 rows, 4 per batch, 2 processes, one of which prints
    expect_trained(base, tmp_path / "out/fsdp2")
