"""BranchLoRA's state on disk, and the example of its docs page."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_moe import safefile
from lora_moe.methods import branch_lora as bl
from lora_moe.methods.branch_lora.continual import TaskSelector

from ..support.branch_lora import D_IN, MASK, E, Host, K, R, learn, randomise, step, tokens


def life(model, steps):
    """Trains two tasks, adds branches and begins a third task; returns its optimizer."""
    for task in range(2):
        if task:
            bl.begin_task(model)
        learn(model, steps, task)
        bl.end_task(model)
    bl.add_branches(model, 2)
    bl.begin_task(model)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)


class Projected(Host):
    def __init__(self, dtype):
        super().__init__(dtype)
        self.projector = nn.Linear(D_IN, D_IN, dtype=dtype)

    def forward(self, x, attention_mask=None):
        return super().forward(self.projector(x))


def projected():
    torch.manual_seed(0)
    return Projected(torch.float32)


def begun():
    model = projected()
    config = bl.branch_lora(E, R, K, 30.0, target_modules=("linear",))
    bl.inject(model, config, modules_to_save=("projector",))
    bl.begin_task(model)
    randomise(model)
    return model


def selector_of(tasks):
    selector = TaskSelector(6, 4)
    g = torch.Generator().manual_seed(0)
    for _ in range(tasks):
        selector.begin_task()
        selector.observe(torch.randn(5, 6, generator=g), torch.randn(5, 4, generator=g))
    return selector


def test_state_survives_save_and_load_in_the_middle_of_a_task(tmp_path):
    model = begun()
    optimizer = life(model, 2)
    for i in range(3):
        step(model, optimizer, 50 + i)
    bl.save(model, tmp_path, selector_of(3))

    other = projected()
    selector = bl.load(other, tmp_path)
    assert [p.requires_grad for p in other.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    resumed = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.02)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, resumed)):
        for i in range(3):
            step(m, o, 60 + i)
        bl.end_task(m)
        bl.begin_task(m)
    assert model.linear.frozen == other.linear.frozen and model.linear.frozen
    for (name, tensor), (_, twin) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        if "router_weight_3" not in name:  # newly initialized
            assert torch.equal(tensor, twin), name
    for task in (0, 1, 2, [0, 1, 2, 0]):
        bl.set_task(model, task), bl.set_task(other, task)
        x = tokens(torch.float32)
        assert torch.equal(model(x, MASK), other(x, MASK))
    for name, keys in selector_of(3).named_buffers():
        assert torch.equal(keys, selector.get_buffer(name))


def rewrite(folder, change=lambda tensors, description: None):
    """Rewrites the saved file with a change."""
    path = Path(folder) / bl.FILE_NAME
    with safefile.open_regular(path) as file:
        metadata, slices = safefile.read_header(file)
        tensors = {key: safefile.read_tensor(file, s) for key, s in slices.items()}
    description = json.loads(metadata["branch_lora"])
    change(tensors, description)
    safefile.write(path, tensors, {"format": "pt", "branch_lora": json.dumps(description)})


CHANGES = {
    "a tensor is missing": (lambda t, d: t.pop("linear.routers.0"), "linear.routers.0: missing"),
    "one too many": (lambda t, d: t.update(x=torch.ones(2)), "'x': not in the model"),
    "a shape": (lambda t, d: t.update({"linear.usage": torch.ones(3)}), r"usage: expected \(7,\)"),
    "NaN": (lambda t, d: t["linear.lora_A"].fill_(torch.nan), "lora_A: expected finite values"),
    "no selector's image": (lambda t, d: t.pop("selector.image_keys"), None),
    "no text": (lambda t, d: t.pop("selector.text_keys"), "selector.text_keys: missing"),
    "a module": (lambda t, d: d.update(frozen={"linear.nothing": []}), "no such module"),
    "not linear": (lambda t, d: d.update(frozen={"": []}), "cannot be replaced"),
    "frozen what is not": (lambda t, d: d.update(frozen={"linear": [7]}), "consistent state"),
    "a task without router": (lambda t, d: d.update(bank=[0, 1, 3]), "consistent state"),
    "routers of nothing": (lambda t, d: d.update(routers=[5, 9, 7]), "consistent state"),
    "many branches": (lambda t, d: d.update(branches=10**9), "consistent state"),
    "an open task of none": (lambda t, d: d.update(bank=[], routers=[]), "consistent state"),
    "another version": (lambda t, d: d.update(version=2), "expected version 1, got 2"),
    "an unknown field": (lambda t, d: d.update(more=1), "expected the fields"),
    "a wrong type": (lambda t, d: d.update(learning=1), "expected the fields"),
    "a wrong reading": (lambda t, d: d.update(reads="last"), "consistent state"),
    "no projector": (lambda t, d: d.update(also=["elsewhere"]), "elsewhere: no such module"),
    "a wild configuration": (lambda t, d: d["config"].update(r=10**6), "r: expected"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_file_is_refused_and_the_model_is_as_it_was(tmp_path, name):
    change, message = CHANGES[name]
    model = begun()
    life(model, 1)
    bl.save(model, tmp_path, selector_of(3))
    rewrite(tmp_path, change)
    other = projected()
    before = {n: (p.clone(), p.requires_grad) for n, p in other.named_parameters()}
    if message is None:
        assert bl.load(other, tmp_path).image_keys is None
        return
    with pytest.raises(ValueError, match=message):
        bl.load(other, tmp_path)
    after = dict(other.named_parameters())
    assert after.keys() == before.keys() and not other._forward_pre_hooks
    assert all(
        torch.equal(after[n], p) and after[n].requires_grad == g for n, (p, g) in before.items()
    )


def test_a_plain_adapter_has_no_state_and_a_model_with_experts_loads_none(tmp_path):
    model = begun()
    bl.save(model, tmp_path)
    assert bl.load(projected(), tmp_path) is None
    with pytest.raises(ValueError, match="already has experts"):
        bl.load(begun(), tmp_path)
    safefile.write(tmp_path / bl.FILE_NAME, {"x": torch.ones(1)}, {"format": "pt"})
    with pytest.raises(ValueError, match="this is not a branch_lora file"):
        bl.load(projected(), tmp_path)


ROOT = Path(__file__).parents[2]


def test_the_example_of_the_page(tmp_path, monkeypatch):
    page = (ROOT / "docs/branch_lora.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(block.splitlines()) < 30
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(block, scope)
    assert [len(row) for row in scope["accuracy"]] == [3, 3, 3]
    assert (tmp_path / "state" / bl.FILE_NAME).is_file()
    assert scope["answers"].shape == (4, 10)
    assert len(bl.routers_of(next(iter(bl.branch_layers(scope["model"]).values())))) == 3
