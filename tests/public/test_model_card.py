"""The README.md that save_adapter writes beside an adapter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lora_moe import LoraMoeConfig, inject, load_adapter, model_card, save_adapter
from lora_moe.routers import TaskRouter

CONFIG = LoraMoeConfig(num_experts=4, r=(2, 4, 2, 2), top_k=2, target_modules=("0",))


def adapted(config=CONFIG):
    torch.manual_seed(0)
    return inject(torch.nn.Sequential(torch.nn.Linear(8, 6)), config)


def named(name):
    model = adapted()
    model.config = type("Config", (), {"_name_or_path": name})()
    return model


def card_of(model, folder):
    save_adapter(model, folder)
    return (folder / "README.md").read_text()


def test_has_method_and_size_and_leaves_the_rest_to_the_author(tmp_path):
    model = adapted()
    text = card_of(model, tmp_path)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"| parameters | {count:,} |" in text
    assert "| method | 4 experts of rank 2 to 4, top-2 softmax, around 1 module |" in text
    for field in ("base model", "training data", "license"):
        assert f"| {field} | [More Information Needed] |" in text


def test_names_a_router_of_another_kind(tmp_path):
    config = LoraMoeConfig(num_experts=3, r=2, top_k=1, target_modules=("0",), router=TaskRouter(3))
    assert "3 experts of rank 2, TaskRouter, around 1 module" in card_of(adapted(config), tmp_path)


def test_its_metadata_is_what_the_hub_reads(tmp_path):
    yaml = pytest.importorskip("yaml")
    text = card_of(named("owner/base-1.7B"), tmp_path)
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["base_model"] == "owner/base-1.7B" and head["library_name"] == "lora-moe"
    assert "base_model" not in yaml.safe_load(card_of(adapted(), tmp_path / "b").split("---\n")[1])


@pytest.mark.parametrize("name", ["/home/me/base", "../base", "here", "a/b\n# c", None])
def test_no_path_of_this_machine_gets_in(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert "| base model | [More Information Needed] |" in card_of(named(name), tmp_path / "out")


def test_a_card_that_is_there_stays_and_is_never_read(tmp_path):
    model = adapted()
    (tmp_path / "README.md").write_bytes(b"\xff mine")
    save_adapter(model, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == b"\xff mine"
    load_adapter(adapted(), tmp_path)


def test_a_card_that_cannot_be_written_loses_no_adapter(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_card, "card", full)
    model = adapted()
    save_adapter(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lora_moe.safetensors"]
    load_adapter(adapted(), tmp_path)


def test_its_code_loads_the_adapter(tmp_path):
    pytest.importorskip("transformers")
    from ..support.models import tiny

    base, out = tmp_path / "base", tmp_path / "out"
    tiny.base().save_pretrained(base)
    model = tiny.model(trained=True).eval()
    (code,) = re.findall(r"^```python\n(.*?)^```", card_of(model, out), re.DOTALL | re.MULTILINE)
    names = {"[More Information Needed]": base, "this folder or repository": out}
    for placeholder, path in names.items():
        assert code.count(placeholder) == 1
        code = code.replace(placeholder, str(path))
    scope = {}
    exec(code, scope)
    ids = torch.arange(3, 11)[None]
    assert torch.equal(scope["model"].eval()(ids).logits, model(ids).logits)


def test_with_peft_the_note_is_added_once(tmp_path):
    path = Path(tmp_path / "README.md")
    path.write_text("# PEFT's own\n")
    for _ in range(2):
        model_card.add_loading_with_peft(tmp_path)
    text = path.read_text()
    assert text.startswith("# PEFT's own\n") and text.count("import lora_moe.peft") == 1
