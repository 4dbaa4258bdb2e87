"""The adapter as read by a server: in its dtypes, either completely or not at all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import lora_moe
from lora_moe import LoraMoeConfig
from lora_moe.middles import CoreMiddle
from lora_moe.routers import SequenceRouter, TaskRouter
from lora_moe.vllm.adapter import Adapter
from lora_moe.vllm.options import options_of

D_IN = 24
SIZES = {"num_experts": 4, "r": 3, "alpha": 4}


def model_with(config):
    model = nn.ModuleDict({"q": nn.Linear(D_IN, 8), "o": nn.Linear(8, D_IN)})
    lora_moe.inject(model, config)
    return model


@pytest.fixture
def saved(tmp_path):
    config = LoraMoeConfig(**SIZES, target_modules=("q", "o"), selection_bias=True)
    model = model_with(config)
    lora_moe.save_adapter(model, tmp_path)
    return model, tmp_path


def test_a_file_is_read_in_the_dtypes_that_are_served(saved):
    model, folder = saved
    with Adapter(folder) as adapter:
        assert set(adapter.configs) == {"q", "o"} and not adapter.misfit("q", D_IN, 8)
        tensors = adapter.tensors("q", D_IN, 8, torch.bfloat16)
    assert set(tensors) == {"lora_A", "lora_B", "router_weight", "selection_bias"}
    assert torch.equal(tensors["lora_A"], model["q"].lora_A.bfloat16())
    assert torch.equal(tensors["router_weight"], model["q"].router_weight)


def test_the_digest_is_of_the_bytes(saved):
    model, folder = saved
    with Adapter(folder) as adapter:
        first = adapter.digest
    with torch.no_grad():
        model["q"].lora_B[0, 0] += 1
    lora_moe.save_adapter(model, folder)
    with Adapter(folder) as adapter:
        assert adapter.digest != first and len(first) == 64


def test_another_base_is_told_by_its_sizes(saved):
    with Adapter(saved[1]) as adapter:
        problems = adapter.misfit("q", D_IN, 12)
    assert problems == ["q.lora_B: expected (12, 12), got (12, 8)"]


def test_files_that_are_no_adapter(saved, tmp_path):
    folder = saved[1]
    with pytest.raises(FileNotFoundError, match=r"expected lora_moe\.safetensors in it"):
        Adapter(tmp_path / "nothing")
    path = folder / "lora_moe.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        ValueError, match=r"expected tensors to fill the file|between 0 and the file"
    ):
        Adapter(folder)


def test_tensors_that_no_configuration_names(saved):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = saved[1] / "lora_moe.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["q.lora_C"] = tensors.pop("q.lora_A")
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"'q\.lora_C': unknown\n  q\.lora_A: missing"):
        Adapter(saved[1])


UNSERVED = {
    "TaskRouter depends on the tasks": {"router": TaskRouter(num_tasks=4)},
    "SequenceRouter depends on more than": {"router": SequenceRouter()},
    "CoreMiddle replaces the gate": {"shared_a": True, "middle": CoreMiddle(num_tasks=2)},
}


@pytest.mark.parametrize(("said", "fields"), UNSERVED.items(), ids=["tasks", "sequence", "middle"])
def test_what_no_token_decides_is_refused_by_name(said, fields, tmp_path):
    model = model_with(
        LoraMoeConfig(**SIZES, target_modules=("q", "o"), balance_coef=0, z_coef=0, **fields)
    )
    lora_moe.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=f"o: {said}.*\n  q: {said}"):
        Adapter(tmp_path)


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        ("LoRAs on the model's own experts", {"target_parameters": ("mlp.experts.down_proj",)}),
        (
            "experts of FFNs",
            {"placement": "ffn", "target_modules": ("gate_proj", "up_proj", "down_proj")},
        ),
    ],
    ids=["fused", "ffn"],
)
def test_experts_that_are_around_no_linear_layer(said, fields, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    if "target_parameters" in fields:
        own = {"num_local_experts": 4, "num_experts_per_tok": 2}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, **own))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    lora_moe.inject(model, LoraMoeConfig(r=2, **fields))
    lora_moe.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=f"layers.0.mlp.*: {said}"):
        Adapter(tmp_path)


def test_modules_that_train_as_a_whole_are_refused(tmp_path):
    model = model_with(LoraMoeConfig(**SIZES, target_modules=("q",), modules_to_save=("o",)))
    lora_moe.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="o: is in modules_to_save"):
        Adapter(tmp_path)


def test_the_folder_that_peft_saves(tmp_path):
    peft = pytest.importorskip("peft")
    from lora_moe.peft import MoeLoraConfig

    torch.manual_seed(0)
    config = MoeLoraConfig(num_experts=3, r=2, target_modules=["q", "o"], rank_pattern={"o": 4})
    model = peft.get_peft_model(
        nn.ModuleDict({"q": nn.Linear(D_IN, 8), "o": nn.Linear(8, D_IN)}), config
    )
    model.save_pretrained(tmp_path)
    with Adapter(tmp_path) as adapter:
        assert adapter.configs["q"].r == 2 and adapter.configs["o"].r == 4
        tensors = adapter.tensors("o", 8, D_IN, torch.float32)
        first = adapter.digest
    (own,) = (m for n, m in model.named_modules() if n.endswith("o.lora_moe_experts.default"))
    assert torch.equal(tensors["lora_A"], own.lora_A)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 3.0}))
    with Adapter(tmp_path) as adapter:
        assert adapter.digest != first


def test_nothing_imports_vllm_before_it_serves():
    code = """if True:
        import sys
        sys.modules["vllm"] = None  # importing it fails
        import lora_moe, lora_moe.vllm.adapter, lora_moe.vllm.bank
        assert lora_moe.vllm.LOAD_FORMAT == "lora_moe"
        try:
            lora_moe.vllm.register()
        except ImportError as error:
            assert "vllm" in str(error)
        else:
            raise SystemExit("register did not ask for vllm")
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "expected the adapter with --load-format lora_moe"),
        ({"lora_moe": {"adapter": 3}}, "expected the adapter with"),
        ({"lora_moe": {"adapter": "a", "adaptor": "b"}}, r"got \['adaptor'\]"),
        ({"lora_moe": {"adapter": "a", "revision": 1}}, "revision: expected a branch"),
    ],
)
def test_options_that_a_server_does_not_know(config, said):
    with pytest.raises(ValueError, match=said):
        options_of(config)
    assert options_of({"lora_moe": {"adapter": "a"}, "else": 1}) == {"adapter": "a"}
