"""Saving through transformers: save_pretrained, state dicts with either naming, wrappers."""

from __future__ import annotations

import copy
import os
from unittest import mock

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from lora_moe import (
    LoraMoeConfig,
    adapter_info,
    inject,
    injected,
    load_adapter,
    remove,
    save_adapter,
    sharded,
)

from ..support.models.llamas import CONFIG, TOKENS, llama, with_experts


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def assert_same_file(*folders):
    one, other = (safetensors.torch.load_file(f / "lora_moe.safetensors") for f in folders)
    assert list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)
    described = [{**adapter_info(f), "tensors": None} for f in folders]
    assert described[0] == described[1]


def test_from_pretrained_gives_the_base_and_load_adapter_the_experts(tmp_path):
    model = with_experts()
    model.save_pretrained(tmp_path)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(base), logits(llama()))
    load_adapter(base, tmp_path)
    assert torch.equal(logits(base), logits(model))


def test_shards_and_a_state_dict_of_ones_own(tmp_path):
    model = with_experts()
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "own", state_dict=model.state_dict())
    for folder in ("shards", "own"):
        base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(base), logits(llama()))


def test_arguments_by_position(tmp_path):
    model = with_experts()
    model.save_pretrained(tmp_path / "all", True, model.state_dict())
    fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "all")
    assert torch.equal(logits(load_adapter(fresh, tmp_path / "all")), logits(model))
    model.save_pretrained(tmp_path / "none", False)
    assert not (tmp_path / "none" / "lora_moe.safetensors").exists()


@pytest.mark.parametrize("how", ["save_pretrained", "push_to_hub"])
def test_what_is_pushed_holds_the_experts(how, tmp_path, monkeypatch):
    """Pushes with a mock Hub client, which inspects the folder instead of uploading it."""
    pushed = []

    def upload(self, working_dir, *args, **kwargs):
        pushed.extend(os.listdir(working_dir))

    for module in (transformers.modeling_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "hf_api", mock.MagicMock())
        monkeypatch.setattr(module, "create_and_tag_model_card", mock.MagicMock())
    monkeypatch.setattr(transformers.PreTrainedModel, "_upload_modified_files", upload)
    model = with_experts()
    if how == "push_to_hub":
        model.push_to_hub("someone/model")
    else:
        model.save_pretrained(tmp_path, push_to_hub=True)
    assert {"model.safetensors", "lora_moe.safetensors"} <= set(pushed)


def test_a_copy_saves_itself(tmp_path):
    model = with_experts()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    twin.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert not saved["lm_head.weight"].any() and model.lm_head.weight.any()


def test_remove_takes_everything_off(tmp_path):
    model = remove(with_experts())
    assert "save_pretrained" not in vars(model) and "generate" not in vars(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "lora_moe.safetensors").exists()
    assert torch.equal(logits(model), logits(llama()))


def test_a_state_dict_of_either_naming_loads(tmp_path):
    model = with_experts()
    model.save_pretrained(tmp_path)
    by_base = safetensors.torch.load_file(tmp_path / "model.safetensors")
    own = model.state_dict()
    assert "model.layers.0.self_attn.q_proj.weight" in by_base
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in own
    for state in (by_base, own):
        other = with_experts(llama(), seed=5)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        other.load_state_dict(state)
        assert torch.equal(logits(other), logits(model))
    base = llama().state_dict()
    missing = with_experts(seed=5).load_state_dict(base, strict=False)
    assert {k.rpartition(".")[2] for k in missing.missing_keys} == {
        "lora_A",
        "lora_B",
        "router_weight",
    }
    assert not missing.unexpected_keys


def test_the_keys_of_the_state_dict_are_attribute_paths():
    model = with_experts()
    for key, tensor in model.state_dict(keep_vars=True).items():
        path, _, name = key.rpartition(".")
        assert getattr(model.get_submodule(path), name) is tensor


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, AveragedModel])
def test_wrappers_leave_no_trace(wrap, tmp_path):
    model = with_experts()
    save_adapter(model, tmp_path / "plain")
    save_adapter(wrap(model), tmp_path / "wrapped")
    assert_same_file(tmp_path / "plain", tmp_path / "wrapped")
    fresh = wrap(llama())
    load_adapter(fresh, tmp_path / "plain")
    assert torch.equal(logits(sharded.unwrapped(fresh)), logits(model))


def test_compiled_blocks_leave_no_trace(tmp_path):
    model = with_experts()
    save_adapter(model, tmp_path / "plain")
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block)
    save_adapter(model, tmp_path / "blocks")
    assert_same_file(tmp_path / "plain", tmp_path / "blocks")
    load_adapter(model, tmp_path / "plain")


def test_pruned_and_parametrized_experts_are_saved_as_they_act(tmp_path):
    model = with_experts()
    layer = next(iter(injected(model).values()))
    prune.l1_unstructured(layer, "lora_A", 0.5)
    torch.nn.utils.parametrizations.weight_norm(layer, "lora_B")
    save_adapter(model, tmp_path)
    fresh = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(fresh), logits(model))


def test_a_model_built_on_meta_comes_back_whole(tmp_path):
    model = with_experts()
    with torch.device("meta"):
        assigned = inject(transformers.LlamaForCausalLM(model.config), CONFIG)
    assigned.load_state_dict(model.state_dict(), assign=True)
    emptied = copy.deepcopy(assigned).to("meta").to_empty(device="cpu")
    emptied.load_state_dict(model.state_dict())
    for other in (assigned, emptied):
        other.model.rotary_emb = llama().model.rotary_emb  # its buffers are in no state dict
        assert torch.equal(logits(other), logits(model))
        assert not any(t.is_meta for layer in injected(other).values() for t in [layer.scaling])


def test_experts_on_meta_are_refused_values(tmp_path):
    save_adapter(with_experts(), tmp_path)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(llama().config)
    with pytest.raises(ValueError, match="load the base's weights first"):
        load_adapter(empty, tmp_path)
    with torch.device("meta"), pytest.raises(ValueError, match="expected values"):
        save_adapter(inject(transformers.LlamaForCausalLM(llama().config), CONFIG), tmp_path)


@pytest.mark.parametrize("kind", ["init_empty", "cpu", "disk", "map"])
def test_accelerates_offloading(kind, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = with_experts()
    save_adapter(model, tmp_path)
    os.makedirs(tmp_path / "offload")
    if kind == "init_empty":
        torch.save(model.state_dict(), tmp_path / "whole.bin")
        with accelerate.init_empty_weights():
            base = inject(transformers.LlamaForCausalLM(model.config), CONFIG)
        accelerate.load_checkpoint_in_model(
            base, str(tmp_path / "whole.bin"), device_map={"": "cpu"}
        )
        base.model.rotary_emb = llama().model.rotary_emb
    else:
        base = llama().eval()
        if kind == "cpu":
            accelerate.cpu_offload(base, execution_device="cpu")
        elif kind == "disk":
            accelerate.disk_offload(base, str(tmp_path / "offload"), execution_device="cpu")
        else:
            places = {"model": "cpu", "lm_head": "disk", "model.layers.1": "disk"}
            places |= {"model.layers.0": "cpu", "model.norm": "cpu", "model.embed_tokens": "cpu"}
            places |= {"model.rotary_emb": "cpu"}
            del places["model"]
            accelerate.dispatch_model(
                base, places, main_device="cpu", offload_dir=str(tmp_path / "offload")
            )
        load_adapter(base, tmp_path)
    assert torch.equal(logits(base), logits(model))


def test_an_offloaded_block_as_a_whole_is_refused(tmp_path):
    """preload_module_classes moves a block's tensors by their names at the time of offloading."""
    accelerate = pytest.importorskip("accelerate")
    base = llama().eval()
    accelerate.cpu_offload(
        base, execution_device="cpu", preload_module_classes=["LlamaDecoderLayer"]
    )
    with pytest.raises(ValueError, match="preload_module_classes"):
        inject(base, LoraMoeConfig(r=2, target_modules=("q_proj",)))
