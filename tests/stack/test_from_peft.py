"""PEFT LoRAs as one bank of experts."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import safetensors.torch
import transformers as hf
from peft import get_peft_model_state_dict

import lora_moe
from lora_moe import LoraMoeConfig, from_peft, injected, to_peft, use_routing

from ..support.peft_loras import FILES, TASKS, by_task, files, lora, same, saved
from ..support.peft_mixtures import IDS, llama, logits


def test_each_tasks_logits_are_pefts(tmp_path):
    pairs = saved(tmp_path)
    model = from_peft(llama(), [path for path, _ in pairs], top_k=2)
    base = logits(llama())
    for task, (_, expected) in enumerate(pairs):
        assert (expected - base).abs().max() > 0.1  # the LoRA affects the output
        same(by_task(model, task), expected)
    assert torch.equal(by_task(model, -1), base)
    mixed = torch.stack([expected[i % 2] for i, (_, expected) in enumerate(pairs[:2])])
    with torch.no_grad(), use_routing(model, task_ids=torch.tensor([0, 1])):
        same(model(input_ids=IDS).logits, mixed)


def test_ranks_scales_and_places_are_the_adapters(tmp_path):
    model = from_peft(llama(), [path for path, _ in saved(tmp_path)])
    layers = injected(model)
    assert len(layers) == 14
    q = layers["model.layers.0.self_attn.q_proj"]
    assert q.config.ranks == (4, 6, 5)
    assert q.scales == pytest.approx((2, 5 / 6**0.5, 16 / 5), rel=1e-15)
    down = layers["model.layers.1.mlp.down_proj"]
    assert down.config.ranks == (1, 1, 1) and down.scales[2] == 7
    assert not down.lora_B[:2].any() and down.lora_A.any()
    trained = {name.rsplit(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "router_weight"}


def test_state_dicts_with_their_configuration(tmp_path):
    models = [lora(seed=i, **fields) for i, fields in enumerate(TASKS)]
    pairs = [(get_peft_model_state_dict(m), m.peft_config["default"]) for m in models]
    plain = [
        {k.removeprefix("base_model.model."): v for k, v in state.items()} for state, _ in pairs
    ]
    pairs[1] = plain[1], pairs[1][1].to_dict()
    model = from_peft(llama(), pairs)
    for task, expected in enumerate(map(logits, models)):
        same(by_task(model, task), expected)
    with pytest.raises(ValueError, match=r"adapters\[1\]: expected a directory or a pair"):
        from_peft(llama(), [pairs[0], pairs[1][0]])


def test_the_router_trains_and_is_as_asked_for(tmp_path):
    paths = [path for path, _ in saved(tmp_path)]
    model = from_peft(llama(), paths, top_k=1, router={"gate": "sigmoid", "router_bias": True})
    config = injected(model)["model.layers.0.mlp.up_proj"].config
    assert (config.top_k, config.gate, config.router_bias) == (1, "sigmoid", True)
    like = LoraMoeConfig(gate="sigmoid", router_bias=True, dropout=0.1)
    config = injected(from_peft(llama(), paths, router=like))["model.layers.0.mlp.up_proj"].config
    assert (config.gate, config.dropout, config.num_experts, config.top_k) == ("sigmoid", 0.1, 3, 2)
    (model(input_ids=IDS, labels=IDS).loss + lora_moe.aux_loss(model)).backward()
    assert all(layer.router_weight.grad.any() for layer in injected(model).values())


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_other_families(tmp_path, family):
    def base():
        torch.manual_seed(0)
        if family == "gpt2":
            return hf.GPT2LMHeadModel(
                hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40)
            ).eval()
        return hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=40, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
                decoder_start_token_id=0,
            )
        ).eval()  # fmt: skip

    batch = {"input_ids": IDS} | ({"labels": IDS} if family == "t5" else {})
    targets = [["c_attn", "c_proj"], ["c_attn"]] if family == "gpt2" else [["q", "wo"], ["v"]]
    expected = []
    for i, names in enumerate(targets):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out
            model = lora(seed=i, base=base, target_modules=names)
        model.save_pretrained(tmp_path / str(i))
        expected.append(model(**batch).logits)
    model = from_peft(base(), [tmp_path / "0", tmp_path / "1"])
    for task, value in enumerate(expected):
        with use_routing(model, task_ids=torch.full((2,), task)):
            same(model(**batch).logits, value)
    for folder, original in zip(to_peft(model, tmp_path / "out"), ("0", "1")):
        assert files(folder) == {n: (tmp_path / original / n).read_bytes() for n in FILES}


def test_any_iterable_of_adapters(tmp_path):
    paths = [path for path, _ in saved(tmp_path, TASKS[:2])]
    model = from_peft(llama(), (str(path) for path in paths))
    assert {layer.config.num_experts for layer in injected(model).values()} == {2}


def test_modules_to_save_of_the_new_bank(tmp_path):
    paths = [path for path, _ in saved(tmp_path, TASKS[:2])]
    for router in ({"modules_to_save": ["lm_head"]}, LoraMoeConfig(modules_to_save=("lm_head",))):
        model = from_peft(llama(), paths, router=router)
        trained = {n for n, p in model.named_parameters() if p.requires_grad and "q_proj" not in n}
        assert "lm_head.weight" in trained and "model.embed_tokens.weight" not in trained
    nn.init.normal_(model.lm_head.weight)
    lora_moe.save_adapter(model, tmp_path / "out")
    assert torch.equal(logits(lora_moe.load_adapter(llama(), tmp_path / "out")), logits(model))
    for names, message in ((["mlp"], r"without a LoRA, got .*up_proj"), (["nothing"], "'nothing'")):
        model = llama()
        with pytest.raises(ValueError, match=f"modules_to_save: expected modules .*{message}"):
            from_peft(model, paths, router={"modules_to_save": names})
        assert not injected(model)


def test_weights_that_an_adapter_lacks_are_told(tmp_path):
    lora(target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / "whole")
    tensors = safetensors.torch.load_file(tmp_path / "whole" / FILES[1])
    short = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
    config = json.loads((tmp_path / "whole" / FILES[0]).read_text())
    with pytest.warns(
        UserWarning, match=r"adapters\[1\].*no weights for 2 of 4 modules.*adds zero"
    ):
        from_peft(llama(), [(tensors, config), (short, config)])
    with warnings.catch_warnings():  # the configuration names only one layer
        warnings.simplefilter("error", UserWarning)
        from_peft(llama(), [(short, config | {"layers_to_transform": [0]})])
        from_peft(llama(), [(tensors, config)])
