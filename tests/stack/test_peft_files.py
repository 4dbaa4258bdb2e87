"""The folder that PEFT saves for a mixture, read without PEFT; Hub repositories from a cache."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import transformers as hf
from peft import PeftModel, get_peft_model

import lora_moe
from lora_moe import adapter_info, injected, load_adapter, locate, peft_format, save_adapter

from ..support.peft_loras import FILES, lora, rewritten
from ..support.peft_mixtures import adapted, config, drawn, llama, logits

FIELDS = {
    "plain": {},
    "unequal": {"r": [1, 2, 3, 4], "lora_alpha": [1.0, 2.0, 3.0, 4.0], "use_rslora": True},
    "patterns": {"rank_pattern": {r"layers\.1\..*q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    "biases": {"router_bias": True, "selection_bias": True, "shared_a": True, "temperature": 0.5},
    "all-linear": {"target_modules": "all-linear", "gate": "sigmoid", "threshold": 0.4},
}


# --- PEFT's folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIELDS)
def test_load_adapter_reads_pefts_folder(tmp_path, kind):
    model = adapted(**FIELDS[kind])
    model.save_pretrained(tmp_path)
    loaded = load_adapter(llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    paths = {p for group in adapter_info(tmp_path)["adapters"] for p in group["modules"]}
    assert paths == set(injected(loaded)) == set(injected(model.get_base_model()))
    again = load_adapter(drawn(adapted(seed=5, **FIELDS[kind]), 6), tmp_path)
    assert torch.equal(logits(again), logits(model))
    save_adapter(loaded, tmp_path / "ours")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "ours")), logits(model))


def test_it_needs_no_peft(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    llama().save_pretrained(tmp_path / "base")
    code = f"""
import sys
sys.modules["peft"] = None
import torch, transformers, lora_moe
model = transformers.LlamaForCausalLM.from_pretrained({str(tmp_path / "base")!r})
lora_moe.load_adapter(model, {str(tmp_path)!r})
with torch.no_grad():
    torch.save(model(torch.arange(3, 9)[None]).logits, {str(tmp_path / "logits")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    expected = logits(model, torch.arange(3, 9)[None])
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected)


@pytest.mark.parametrize("fields", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}])
def test_modules_to_save_and_frozen_experts(tmp_path, fields):
    def base():
        return llama(hf.LlamaForSequenceClassification, num_labels=3)

    model = drawn(get_peft_model(base(), config(**{"task_type": None} | fields)))
    lora_moe.freeze_experts(model, [1, 3])
    model.save_pretrained(tmp_path)
    loaded = load_adapter(base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.score.weight.requires_grad
    assert {layer.frozen for layer in injected(loaded).values()} == {(1, 3)}
    save_adapter(loaded, tmp_path / "ours")
    assert torch.equal(logits(load_adapter(base(), tmp_path / "ours")), logits(model))
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))


BAD = {
    "lora": ({"peft_type": "LORA"}, None, r"expected peft_type 'LORA_MOE', got 'LORA'.*from_peft"),
    "unknown": ({"newer": 1}, None, r"expected the fields of a MoeLoraConfig, got \['newer'\]"),
    "experts": ({"num_experts": 10**9}, None, r"num_experts: expected an integer in \[1, 4096\]"),
    "fewer": ({"num_experts": 3, "top_k": 1}, None, r"expected \(9, 32\), got \(12, 32\)"),
    "frozen": ({"frozen_experts": [7]}, None, r"expected expert ids in \[0, 4\)"),
    "saved": ({"modules_to_save": "score"}, None, r"expected names in modules_to_save, got 'score'"),
    "pattern": ({"rank_pattern": {"(.*)*x": 1}}, None, r"rank_pattern: expected module names, or reg"),
    "missing": ({}, "0.mlp.up_proj.lora_moe_experts.lora_B", r"up_proj\.lora_B: missing"),
    "extra": ({"router_bias": None, "modules_to_save": []}, "+lm_head.weight", r"'lm_head\.weight': not in"),
    "nothing": ({}, "lora_moe_experts", r"expected lora_moe_experts tensors in the file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_folder_is_refused_and_the_model_is_as_it_was(tmp_path, kind):
    fields, part, message = BAD[kind]
    adapted().save_pretrained(tmp_path)

    def change(state):
        if part and part.startswith("+"):
            return state | {f"base_model.model.{part[1:]}": torch.zeros(40, 32)}
        return {k: v for k, v in state.items() if part is None or part not in k}

    rewritten(tmp_path, change, **{k: v for k, v in fields.items() if v is not None})
    model = llama()
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        load_adapter(model, tmp_path)
    assert time.perf_counter() - begin < 3
    assert not injected(model) and all(p.requires_grad for p in model.parameters())


# --- patterns from a file ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        *("q_proj", r"layers\.\d+\..*q_proj", "(q|v)_proj", "^model.layers.0"),
        *("[qkv]_proj", r"(?:q|k)_proj", "a?b"),
    ],
)
def test_patterns_match_as_pefts(pattern):
    from peft.utils.other import get_pattern_key

    patterns = peft_format.expect_patterns("rank_pattern", {"o_proj": 1, pattern: 2})
    for path in (
        "model.layers.0.self_attn.q_proj",
        "q_proj",
        "xq_proj",
        "model.layers.0",
        "v_proj",
        "b",
    ):
        expected = patterns.get(get_pattern_key(patterns, path), 3)
        assert peft_format.matched(patterns, path, 3) == expected


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|a)*b", "(.*){9}", ".*.*.*x", r"(a)\1+", "(?=a+)b", "(?i)a", "a" * 2000, "((a*)b)?"],
)  # fmt: skip
def test_patterns_that_may_take_minutes_are_refused(pattern):
    with pytest.raises(ValueError, match="at most two repetitions and no repeated group"):
        peft_format.expect_patterns("rank_pattern", {pattern: 2})


def test_the_slowest_patterns_that_pass_are_quick():
    patterns = {f".*a.*{'a' * i}b": i for i in range(peft_format.MAX_REPEATED)}
    patterns = peft_format.expect_patterns("rank_pattern", patterns)
    begin = time.perf_counter()
    assert peft_format.matched(patterns, "a" * 80, 3) == 3
    assert time.perf_counter() - begin < 3
    with pytest.raises(ValueError, match="expected at most 16 patterns with repetitions, got 17"):
        peft_format.expect_patterns("rank_pattern", {f"a{i}.*": 1 for i in range(17)})


def test_many_plain_patterns_are_quick_and_bounded():
    many = {f"layers.{i}.q_proj": i for i in range(peft_format.MAX_PATTERNS)}
    begin = time.perf_counter()
    patterns = peft_format.expect_patterns("rank_pattern", many)
    for i in range(200):
        assert peft_format.matched(patterns, f"model.layers.{i}.q_proj", -1) == i
    assert time.perf_counter() - begin < 5
    with pytest.raises(ValueError, match="expected at most 2048 patterns, got 2049"):
        peft_format.expect_patterns("rank_pattern", many | {"one more": 1})


# --- the hub -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """put(repository, {revision: folder}) fills a cache like huggingface_hub's, without a network."""
    constants = pytest.importorskip("huggingface_hub").constants
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repository, revisions):
        root = cache / f"models--{repository.replace('/', '--')}"
        for number, (revision, folder) in enumerate(revisions.items()):
            commit = f"{number:040x}"
            (root / "refs").mkdir(parents=True, exist_ok=True)
            (root / "refs" / revision).write_text(commit)
            (root / "snapshots" / commit).mkdir(parents=True)
            (root / "blobs").mkdir(exist_ok=True)
            for file in folder.iterdir():
                blob = root / "blobs" / f"{number}{file.name.encode().hex()}"
                blob.write_bytes(file.read_bytes())
                (root / "snapshots" / commit / file.name).symlink_to(blob)

    return put


def test_a_repository_and_its_revisions(tmp_path, hub):
    ours, pefts = adapted(seed=3), adapted(seed=4)
    save_adapter(ours, tmp_path / "ours")
    pefts.save_pretrained(tmp_path / "pefts")
    hub("org/name", {"main": tmp_path / "ours", "v2": tmp_path / "pefts"})
    assert torch.equal(logits(load_adapter(llama(), "org/name")), logits(ours))
    assert torch.equal(logits(load_adapter(llama(), "org/name", revision="v2")), logits(pefts))
    assert adapter_info("org/name", revision="v2")["library"].startswith("PEFT")
    with pytest.raises(
        FileNotFoundError, match=r"org/name: expected .*v3|org/name: expected a directory"
    ):
        load_adapter(llama(), "org/name", revision="v3")
    with pytest.raises(FileNotFoundError, match="org/other: expected a directory"):
        load_adapter(llama(), "org/other")


def test_from_peft_takes_repositories(tmp_path, hub):
    model = lora()
    model.save_pretrained(tmp_path / "lora")
    hub("org/lora", {"main": tmp_path / "lora"})
    ours = lora_moe.from_peft(llama(), ["org/lora", tmp_path / "lora"])
    with lora_moe.use_routing(ours, task_ids=torch.tensor([0, 1])):
        assert torch.allclose(logits(ours), logits(model), rtol=0, atol=1e-4)


def test_a_directory_of_that_name_comes_first(tmp_path, hub, monkeypatch):
    save_adapter(adapted(), tmp_path / "org/name")
    monkeypatch.chdir(tmp_path)
    assert not locate.is_repository("org/name")
    load_adapter(llama(), "org/name")
    with pytest.raises(ValueError, match=r"revision: expected None for org/name"):
        load_adapter(llama(), "org/name", revision="main")
    for path in ("./org/other", "/org/other", "a/b/c", "name", tmp_path / "nothing", "../x/y"):
        assert not locate.is_repository(path)
        with pytest.raises(FileNotFoundError, match=re.escape("lora_moe.safetensors")):
            load_adapter(llama(), path)


def test_a_repository_without_the_hubs_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        load_adapter(llama(), "org/name")


def test_a_pickle_from_a_repository_is_not_read(tmp_path, hub):
    (tmp_path / "bad").mkdir()
    torch.save({"x": torch.zeros(1)}, tmp_path / "bad" / FILES[1])
    (tmp_path / "bad" / FILES[0]).write_text(json.dumps({"peft_type": "LORA_MOE"}))
    hub("org/bad", {"main": tmp_path / "bad"})
    with pytest.raises(ValueError, match="this is a pickle"):
        load_adapter(llama(), "org/bad")
