"""PEFT's Poly checkpoints give the same outputs after conversion; other files are refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lora_moe import adapter_info, load_adapter, use_routing
from lora_moe.convert import convert

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")

TASKS = torch.tensor([2, 0, 2])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def trained(**fields):
    fields = {"r": 2, "n_tasks": 3, "n_skills": 4, "init_weights": False} | fields
    config = peft.PolyConfig(target_modules=["first", "last"], **fields)
    model = peft.get_peft_model(Model(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "module_logits" in name:
                nn.init.normal_(parameter)
    return model


def test_the_same_outputs(tmp_path):
    theirs, x = trained(), torch.randn(3, 5, 8)
    theirs.save_pretrained(tmp_path / "theirs")
    converted = convert(tmp_path / "theirs", tmp_path / "ours")
    assert converted.format == "poly" and "task_ids" in converted.notes[0]
    ours = load_adapter(Model(), tmp_path / "ours").eval()
    with torch.no_grad():
        want = theirs.base_model(x, task_ids=TASKS)
        with use_routing(ours, task_ids=TASKS):
            torch.testing.assert_close(ours(x), want)
        assert (want - Model()(x)).abs().max() > 0.01
    assert adapter_info(tmp_path / "ours")["adapters"][0]["config"].num_tasks == 3


def test_splits_are_refused(tmp_path):
    trained(n_splits=2).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"expected n_splits=1 .* multi-head routing"):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "first.poly_lora_A",
            torch.ones(1, 4, 8, 3),
            r"expected \(1, 4, 8, 2\), got \(1, 4, 8, 3\)",
        ),
        ("first.poly_lora_B", torch.ones(1, 2, 12), r"expected \(1, 4, 2, 'D_out'\)"),
        ("first.poly_router.module_logits", torch.ones(3, 5), r"expected \(3, 4\), got \(3, 5\)"),
        ("first.poly_router.module_logits", None, "expected lora_A, lora_B and router"),
        ("first.poly_lora_A", torch.ones(1, 4, 8, 2, dtype=torch.int64), "expected one of"),
        ("first.poly_lora_C", torch.ones(2), "poly_lora_C"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, key, value, message):
    trained().save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/adapter_model.safetensors"
    state = safetensors.load_file(file)
    state.pop(f"base_model.model.{key}", None)
    if value is not None:
        state[f"base_model.model.{key}"] = value
    safetensors.save_file(state, file)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_fields_may_hold_anything(tmp_path):
    trained().save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/adapter_config.json"
    config = json.loads(file.read_text())
    for field in ("r", "n_tasks", "n_skills", "n_splits", "poly_type", "use_dora"):
        for value in (True, 10**12, "2", [1], {"a": 1}, 2.0):
            file.write_text(json.dumps(config | {field: value}))
            try:
                convert(tmp_path / "theirs", tmp_path / "ours")
            except ValueError as error:
                assert len(str(error)) < 3000, error
