"""Modules of whole models that cannot take experts: read elsewhere, tied, quantized or sharded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_moe import LoraMoeConfig, inject, injected, load_adapter, save_adapter
from lora_moe.targets import why_not

CONFIG = {"num_experts": 4, "r": 2}


def names(*targets):
    return LoraMoeConfig(**CONFIG, target_modules=targets)


def transformers_model(name, **fields):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    family = name.partition("For")[0].removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**sizes | fields)
    return getattr(transformers, name)(config)


JAMBA = {"num_experts": 2, "num_hidden_layers": 2, "mamba_d_state": 4, "num_key_value_heads": 2}
READERS = {
    "mamba": ("MambaForCausalLM", {}, "dt_proj", "MambaMixer"),
    "jamba": ("JambaForCausalLM", JAMBA, "dt_proj", "JambaMambaMixer"),
    "wavlm-q": ("WavLMModel", {}, "q_proj", "WavLMAttention"),
    "wavlm-out": ("WavLMModel", {}, "out_proj", "WavLMAttention"),
    "bloom": ("BloomForCausalLM", {"pretraining_tp": 2, "slow_but_exact": True}, "dense", "Bloom"),
}


@pytest.mark.parametrize("name, fields, target, reader", READERS.values(), ids=READERS)
def test_parents_that_read_the_weight(name, fields, target, reader):
    model = transformers_model(name, **fields)
    with pytest.raises(ValueError, match=rf"{target} \({reader}\w* reads its weight without"):
        inject(model, names(target))


def test_a_setting_of_the_parent_decides():
    model = transformers_model("BloomForCausalLM", n_layer=1)
    assert list(injected(inject(model, names("dense")))) == ["transformer.h.0.self_attention.dense"]


def test_a_quantized_parent_calls_what_it_reads_otherwise():
    """Jamba and FalconMamba check their configuration for whether dt_proj has a weight to read."""
    model = transformers_model("JambaForCausalLM", **JAMBA)
    assert "reads its weight" in why_not(model, "model.layers.0.mamba.dt_proj")
    model.config._is_quantized = True
    assert why_not(model, "model.layers.0.mamba.dt_proj") is None


def test_a_grandparent_that_reads_the_weight():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})

        def forward(self, x):
            return F.linear(x, self.inner.proj.weight)

    assert "Outer reads its weight" in why_not(nn.Sequential(Outer()), "0.inner.proj")


def tied(device="cpu"):
    with torch.device(device):
        return transformers_model("LlamaForCausalLM", tie_word_embeddings=True)


def offloaded():
    """Each parameter is a separate object on meta, as accelerate leaves them."""
    model = tied("meta")
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


TIED = {
    "tied": tied,
    "meta": lambda: tied("meta"),
    "declared": offloaded,
    "wrapped": lambda: nn.Sequential(tied()),
}


@pytest.mark.parametrize("make", TIED.values(), ids=TIED)
def test_a_tied_head_is_refused(make):
    model = make()
    with pytest.raises(
        ValueError, match=r"lm_head \(its weight is tied to that of \S*embed_tokens"
    ):
        inject(model, names("q_proj", "lm_head"))
    assert not injected(model)
    inject(model, names("q_proj"))


def test_the_suggested_change_unties_the_head(tmp_path):
    model, ids = tied(), torch.tensor([[1, 2, 3]])
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    want = model(ids).logits
    inject(model, names("lm_head"))
    model.tie_weights()
    assert torch.equal(model(ids).logits, want)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="lm_head: its weight is tied"):
        load_adapter(tied(), tmp_path)


def test_weights_that_a_plain_model_shares_stay_shared():
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8)})
    model["head"].weight = model["embed"].weight
    inject(model, names("head"))
    assert model["head"].weight is model["embed"].weight


@pytest.mark.parametrize("how", ["itself", "inside"])
def test_scripted_modules_are_refused(how):
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    model = nn.Sequential(nn.Linear(4, 4), scripted) if how == "inside" else scripted
    with pytest.raises(ValueError, match=r"0 \(TorchScript has compiled it: inject before"):
        inject(model, names("0"))
    if how == "inside":
        inject(model, LoraMoeConfig(**CONFIG, target_modules="all-linear"))
        assert list(injected(model)) == ["0"]


def test_an_exported_program_reads_its_weights():
    program = torch.export.export(nn.Sequential(nn.Linear(4, 4)), (torch.zeros(1, 4),))
    assert "GraphModule reads its weight" in why_not(program.module(), "0")


def test_modules_that_peft_adapts():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], r=2)
    model = peft.get_peft_model(transformers_model("LlamaForCausalLM"), lora)
    for target in ("q_proj", "base_layer", "default"):
        with pytest.raises(
            ValueError, match=r"PEFT has adapted it.* merge_and_unload\(\) or unload"
        ):
            inject(model, names(target))
    inject(model, LoraMoeConfig(**CONFIG, target_modules="all-linear"), freeze=False)
    assert not [path for path in injected(model) if "q_proj" in path or "lora" in path]
    merged = peft.get_peft_model(transformers_model("LlamaForCausalLM"), lora).merge_and_unload()
    assert list(injected(inject(merged, names("q_proj")))) == ["model.layers.0.self_attn.q_proj"]


@pytest.fixture
def mesh(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_fully_shard_before_inject_is_refused(mesh, tmp_path):
    from torch.distributed.fsdp import fully_shard

    def build():
        return nn.Sequential(nn.Sequential(nn.Linear(4, 4)))

    save_adapter(inject(build(), names("0.0")), tmp_path)
    root, layer = build(), build()
    fully_shard(root, mesh=mesh)
    fully_shard(layer[0], mesh=mesh)
    for model in (root, layer):
        for attempt in (lambda m: inject(m, names("0.0")), lambda m: load_adapter(m, tmp_path)):
            with pytest.raises(ValueError, match="inject first, then fully_shard"):
                attempt(model)


@pytest.mark.parametrize("style", ["ColwiseParallel", "RowwiseParallel"])
def test_tensor_parallel_modules_are_refused(mesh, style):
    from torch.distributed.tensor import parallel

    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    parallel.parallelize_module(model, mesh, {"q_proj": getattr(parallel, style)()})
    with pytest.raises(ValueError, match=r"q_proj \(tensor-parallel modules cannot.*with FSDP2"):
        inject(model, names("q_proj"))
    inject(model, names("v_proj"))
