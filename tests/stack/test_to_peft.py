"""Writes each expert of a bank as a PEFT LoRA."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import safetensors.torch
import transformers as hf
from peft import PeftModel, get_peft_model

import lora_moe
from lora_moe import LoraMoeConfig, from_peft, injected, to_peft, use_routing

from ..support.peft_loras import FILES, TASKS, by_task, files, rewritten, same, saved
from ..support.peft_mixtures import llama, logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_files_are_equal_bit_for_bit_after_the_round_trip(tmp_path, dtype):
    paths = [path for path, _ in saved(tmp_path)]
    for path in paths[:2]:  # the third stays fp32: each adapter keeps its dtype
        rewritten(path, lambda state: {k: v.to(dtype) for k, v in state.items()})
    model = from_peft(llama(), paths)
    folders = to_peft(model, tmp_path / "out")
    assert folders == [tmp_path / "out" / f"expert_{e}" for e in range(3)]
    assert sorted(os.listdir(tmp_path / "out")) == ["expert_0", "expert_1", "expert_2"]
    for folder, path in zip(folders, paths):
        assert files(folder)[FILES[1]] == files(path)[FILES[1]]
        assert sorted(files(folder)) == FILES
        assert json.loads(files(folder)[FILES[0]]) == json.loads(files(path)[FILES[0]])


def test_a_trained_expert_is_not_rounded_to_what_it_came_from(tmp_path):
    ((path, _),) = saved(tmp_path, TASKS[:1])
    rewritten(path, lambda state: {k: v.to(torch.bfloat16) for k, v in state.items()})
    model = from_peft(llama(), [path])
    layer = injected(model)["model.layers.1.self_attn.v_proj"]
    with torch.no_grad():
        layer.lora_B[0, 0] += 1e-4
    (folder,) = to_peft(model, tmp_path / "out")
    state = safetensors.torch.load_file(folder / FILES[1])
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    assert state[key].dtype == torch.float32 and torch.equal(state[key], layer.lora_B.T)
    assert state[key.replace("lora_B", "lora_A")].dtype == torch.bfloat16


def test_an_expert_that_learned_where_its_adapter_had_nothing_keeps_it(tmp_path):
    model = from_peft(llama(), [path for path, _ in saved(tmp_path)])
    with torch.no_grad():
        injected(model)["model.layers.1.mlp.down_proj"].lora_B.normal_()
    folders = to_peft(model, tmp_path / "out")
    for task, folder in enumerate(folders):
        loaded = PeftModel.from_pretrained(llama(), folder)
        same(logits(loaded), by_task(model, task))


BANKS = {
    "plain": {"r": 3, "alpha": 6.0},
    "unequal": {"r": (1, 4, 2), "alpha": (3.0, 2.5, 1.0), "use_rslora": True},
    "shared-a": {"r": 2, "shared_a": True},
    "one-layer": {"target_modules": r"model\.layers\.1\..*(q|up)_proj"},
    "everything": {"target_modules": "all-linear", "adapter_dtype": "bfloat16"},
}


@pytest.mark.parametrize("bank", BANKS)
def test_peft_computes_what_each_expert_does(tmp_path, bank):
    fields = {"num_experts": 3, "top_k": 2, "target_modules": ("q_proj", "up_proj")} | BANKS[bank]
    model = lora_moe.inject(llama(), LoraMoeConfig(**fields))
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    for task, folder in enumerate(to_peft(model, tmp_path)):
        assert sorted(files(folder)) == FILES
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # a pattern that matches nothing
            loaded = PeftModel.from_pretrained(llama(), folder)
        expected = by_task(model, task)
        assert (expected - logits(llama())).abs().max() > 0.1
        same(logits(loaded), expected)
        merged = logits(loaded.merge_and_unload())
        assert torch.allclose(merged, expected, rtol=0, atol=1e-3)


def test_layers_of_different_ranks_and_scales(tmp_path):
    model = llama()
    groups = [(("q_proj",), (2, 3), False), ((r"model.layers.1.mlp.up_proj",), (4, 1), True)]
    for names, ranks, root in groups:
        config = LoraMoeConfig(
            num_experts=2, r=ranks, target_modules=names, use_rslora=root, alpha=5
        )
        lora_moe.inject(model, config)
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    for task, folder in enumerate(to_peft(model, tmp_path)):
        loaded = PeftModel.from_pretrained(llama(), folder)
        same(logits(loaded), by_task(model, task))
    again = from_peft(llama(), [tmp_path / "expert_0", tmp_path / "expert_1"])
    for task in range(2):
        same(by_task(again, task), by_task(model, task))


def test_a_name_inside_another_ones_path_gets_its_own_rank(tmp_path):
    """PEFT's patterns match the end of a path, so "first" also matches "inner.first"."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.second(self.first(x))

    class Outer(Pair):
        def __init__(self):
            super().__init__()
            self.inner = Pair()

        def forward(self, x):
            return self.inner(super().forward(x))

    model = Outer()
    for names, r in ((r"first", 1), (r"inner\.first", 2), (r"second|inner\.second", 3)):
        lora_moe.inject(model, LoraMoeConfig(num_experts=2, r=r, target_modules=names))
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 6)
    for task, folder in enumerate(to_peft(model, tmp_path)):
        loaded = PeftModel.from_pretrained(Outer(), folder)
        with use_routing(model, task_ids=torch.full((4,), task)):
            same(loaded(x), model(x))


def test_chosen_experts_and_nothing_beside_them(tmp_path):
    model = lora_moe.inject(llama(), LoraMoeConfig(num_experts=5, target_modules=("q_proj",)))
    assert to_peft(model, tmp_path / "a", experts=[3, 1]) == [
        tmp_path / "a/expert_1",
        tmp_path / "a/expert_3",
    ]
    assert sorted(os.listdir(tmp_path / "a")) == ["expert_1", "expert_3"]
    assert to_peft(model, tmp_path / "b", experts=4) == [tmp_path / "b/expert_4"]
    to_peft(model, tmp_path / "b", experts=4)  # overwrites its own files
    assert sorted(files(tmp_path / "b/expert_4")) == FILES
    for wrong in ([5], [-1], "all", [0.5]):
        with pytest.raises(ValueError, match=r"experts: expected expert ids in \[0, 5\)"):
            to_peft(model, tmp_path / "c", experts=wrong)
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="expected a model with experts"):
        to_peft(llama(), tmp_path / "out")
    model = lora_moe.inject(llama(), LoraMoeConfig(num_experts=2, target_modules=("q_proj",)))
    lora_moe.inject(model, LoraMoeConfig(num_experts=3, target_modules=("up_proj",)))
    with pytest.raises(ValueError, match=r"same number of experts in each layer, got \[2, 3\]"):
        to_peft(model, tmp_path / "out")
    model = lora_moe.inject(llama(), LoraMoeConfig(num_experts=2, target_modules=("q_proj",)))
    injected(model)["model.layers.1.self_attn.q_proj"].lora_B.data[-1, -1] = float("nan")
    with pytest.raises(ValueError, match=r"expert 1: .*lora_B\.weight: expected finite values"):
        to_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_modules_to_save_go_with_each_expert(tmp_path):
    def base():
        return llama(hf.LlamaForSequenceClassification, num_labels=3)

    config = LoraMoeConfig(num_experts=2, target_modules=("q_proj",), modules_to_save=("score",))
    model = lora_moe.inject(base(), config)
    for p in (model.score.weight, *(layer.lora_B for layer in injected(model).values())):
        nn.init.normal_(p)
    for task, folder in enumerate(to_peft(model, tmp_path)):
        loaded = PeftModel.from_pretrained(base(), folder)
        same(logits(loaded), by_task(model, task))


def test_the_active_adapter_of_a_peft_model(tmp_path):
    from lora_moe.peft import MoeLoraConfig

    model = get_peft_model(llama(), MoeLoraConfig(num_experts=2, r=2, target_modules=["q_proj"]))
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    for task, folder in enumerate(to_peft(model, tmp_path)):
        loaded = PeftModel.from_pretrained(llama(), folder)
        same(logits(loaded), by_task(model, task))
