"""PEFT adapters that a bank cannot represent are refused by name."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import transformers as hf
from peft import IA3Config, LoraConfig, get_peft_model

import lora_moe
from lora_moe import LoraMoeConfig, from_peft, injected, to_peft

from ..support.peft_loras import FILES, TASKS, by_task, lora, rewritten, same, saved
from ..support.peft_mixtures import Twice, llama, logits

LOST = {
    "dora": ({"use_dora": True}, r"use_dora=True.*lora_magnitude_vector"),
    "bias": ({"bias": "all"}, r"bias='all'"),
    "lora-bias": ({"lora_bias": True}, r"lora_bias=True.*lora_B\.bias"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, r"lora_embedding_A"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\].*lm_head"),
    "tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\]"),
    "pissa": ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' \(it changes the base"),
    "parameters": ({"target_parameters": ["q_proj.weight"], "target_modules": []}, r"target_parameters"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LOST)
def test_what_would_be_lost_is_refused_by_name(tmp_path, kind):
    fields, message = LOST[kind]
    saved(tmp_path, [{"target_modules": ["q_proj"]}, fields])
    model = llama()
    with pytest.raises(ValueError, match=rf"(?s)1: expected a plain LoRA.*{message}"):
        from_peft(model, [tmp_path / "0", tmp_path / "1"])
    assert not injected(model) and all(p.requires_grad for p in model.parameters())


def test_a_field_of_a_peft_to_come_is_refused_if_it_is_set(tmp_path):
    ((path, expected),) = saved(tmp_path, TASKS[:1])
    rewritten(path, use_newer=False, newer_config=None)
    same(by_task(from_peft(llama(), [path]), 0), expected)
    rewritten(path, use_newer=True)
    with pytest.raises(ValueError, match="use_newer=True"):
        from_peft(llama(), [path])


def test_other_methods_and_missing_files(tmp_path):
    get_peft_model(
        llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    ).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="expected peft_type 'LORA', got 'IA3'"):
        from_peft(llama(), [tmp_path / "ia3"])
    lora().save_pretrained(tmp_path / "bin", safe_serialization=False)
    with pytest.raises(
        FileNotFoundError, match=r"adapter_model\.bin.*pickles run code and are not opened"
    ):
        from_peft(llama(), [tmp_path / "bin"])
    with pytest.raises(
        FileNotFoundError, match=r"expected adapter_model\.safetensors and adapter_config"
    ):
        from_peft(llama(), [tmp_path / "nowhere"])
    for wrong in ([], {}, str(tmp_path), tmp_path, None, 5):
        with pytest.raises(ValueError, match="adapters: expected a non-empty list"):
            from_peft(llama(), wrong)
    with pytest.raises(ValueError, match=r"adapters\[0\]: expected a directory or a pair"):
        from_peft(llama(), [5])


def without(part):
    return lambda state: {k: v for k, v in state.items() if part not in k}


def changed(part, change):
    return lambda state: {k: change(v) if part in k else v for k, v in state.items()}


def renamed(old, new):
    return lambda state: {k.replace(old, new): v for k, v in state.items()}


def as_is(state):
    return state


BAD = {
    "missing-b": (without("0.self_attn.q_proj.lora_B"), {}, r"layers\.0\..*q_proj: lora_B is missing"),
    "missing-a": (without("0.self_attn.q_proj.lora_A"), {}, r"layers\.0\..*q_proj: lora_A is missing"),
    "empty": (lambda state: {"x": torch.zeros(1)}, {}, r"tensor 'x'"),
    "wide": (changed("v_proj.lora_A", lambda t: t.repeat(1, 2)), {}, r"\(4, 32\), got \(4, 64\)"),
    "rank": (as_is, {"r": 5}, r"lora_A: expected \(5, 32\), got \(4, 32\)"),
    "rank-text": (as_is, {"r": "4"}, r"r: expected an integer in \[1, 1024\], got '4'"),
    "rank-bool": (as_is, {"r": True}, r"r: expected an integer in \[1, 1024\], got True"),
    "alpha": (as_is, {"lora_alpha": -1}, r"lora_alpha: expected a number in \[0, 1e\+06\], got -1"),
    "alpha-big": (as_is, {"lora_alpha": 1e30}, r"lora_alpha: expected a number in \[0, 1e\+06\], got 1e\+30"),
    "rslora": (as_is, {"use_rslora": "yes"}, r"use_rslora: expected a bool, got 'yes'"),
    "nan": (changed("lora_B", lambda t: t * float("nan")), {}, r"expected finite values in torch\.float32"),
    "int8": (changed("lora_B", lambda t: t.to(torch.int8)), {}, r"lora_B: expected one of .*got I8"),
    "no-module": (renamed("layers.1", "layers.7"), {}, r"layers\.7\.self_attn\.q_proj: no such module"),
    "norm": (renamed("self_attn.q_proj", "input_layernorm"), {}, r"a LlamaRMSNorm is not linear"),
    "repeated-group": (as_is, {"alpha_pattern": {"(a+)+$": 3}}, r"alpha_pattern: .*no\s+repeated group"),
    "no-expression": (as_is, {"rank_pattern": {"(": 3}}, r"rank_pattern: expected a regular expression"),
    "pattern-list": (as_is, {"rank_pattern": [3]}, r"rank_pattern: expected a dict"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_adapter_is_refused_and_the_model_is_as_it_was(tmp_path, kind):
    tensors, fields, message = BAD[kind]
    saved(tmp_path, [TASKS[0], TASKS[0]])
    rewritten(tmp_path / "1", tensors, **fields)
    model = llama()
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        from_peft(model, [tmp_path / "0", tmp_path / "1"])
    assert time.perf_counter() - begin < 5
    assert not injected(model) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), logits(llama()))


def test_hostile_files_are_not_opened(tmp_path):
    ((path, _),) = saved(tmp_path, TASKS[:1])
    for name in FILES:
        text = (path / name).read_bytes()
        (path / name).rename(tmp_path / name)
        (path / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match="a symbolic link"):
            from_peft(llama(), [path])
        (path / name).unlink()
        (path / name).write_bytes(text)
    (path / FILES[0]).write_text("[" * 10_000)
    with pytest.raises(ValueError, match="expected JSON"):
        from_peft(llama(), [path])
    (path / FILES[0]).write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        from_peft(llama(), [path])
    (path / FILES[0]).write_text(" " * (5 << 20))
    with pytest.raises(ValueError, match="expected at most"):
        from_peft(llama(), [path])


def test_unfit_models_and_routers(tmp_path):
    paths = [path for path, _ in saved(tmp_path, TASKS[:1])]
    with pytest.raises(ValueError, match="expected a model without experts"):
        from_peft(lora_moe.inject(llama(), LoraMoeConfig(target_modules=("o_proj",))), paths)
    with pytest.raises(ValueError, match="PEFT has adapted it"):
        from_peft(lora(), paths)
    with torch.device("meta"):
        empty = hf.LlamaForCausalLM(llama().config)
    with pytest.raises(ValueError, match="the meta device"):
        from_peft(empty, paths)
    with pytest.raises(ValueError, match=r"router: expected fields from .*got \['r'\]"):
        from_peft(llama(), paths, router={"r": 3})
    with pytest.raises(ValueError, match="router: expected a dict"):
        from_peft(llama(), paths, router="token")
    with pytest.raises(ValueError, match="top_k: expected an integer"):
        from_peft(llama(), paths, top_k=2)


def test_a_module_of_two_names_is_refused_both_ways(tmp_path):
    """PEFT adapts only the first name, experts apply to both: the functions would differ."""
    get_peft_model(Twice(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(
        ValueError, match="first: it has the names first, second, of which PEFT adapts one"
    ):
        from_peft(Twice(), [tmp_path / "lora"])
    model = lora_moe.inject(Twice(), LoraMoeConfig(target_modules=("first",)))
    with pytest.raises(
        ValueError, match=r"modules with a single name.*first \(it has the names first, second\)"
    ):
        to_peft(model, tmp_path / "out")
    layer = lora_moe.LoraMoeLinear(nn.Linear(4, 4), LoraMoeConfig())
    with pytest.raises(ValueError, match="expected a module around a LoraMoeLinear, got one"):
        to_peft(layer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
