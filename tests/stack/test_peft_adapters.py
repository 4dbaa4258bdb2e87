"""Several mixtures in one PEFT model: switching, adding, unloading."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import lora_moe

from ..support.peft_mixtures import IDS, adapted, config, drawn, llama, logits

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def test_samples_of_several_adapters_in_one_batch_are_refused():
    model = adapted()
    with pytest.raises(ValueError, match="adapter_names: expected None"):
        model(input_ids=IDS, adapter_names=["default", "default"])


def test_switching_two_adapters():
    model = adapted(seed=2)
    model.add_adapter("other", config(num_experts=2, r=[1, 5], top_k=1, target_modules=["v_proj"]))
    first = logits(model)
    model.set_adapter("other")
    drawn(model, seed=3)
    second = logits(model)
    assert not torch.equal(first, second)
    for name, expected in (("default", first), ("other", second)):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_moe_experts.other." in name for name in names)

    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert not any("default" in name for name in model.state_dict())


def test_functions_address_the_active_adapter():
    model = adapted()
    model.add_adapter("other", config(num_experts=2, top_k=1, target_modules=["v_proj"]))
    logits(model)
    assert {p.rsplit(".")[-1] for p in lora_moe.router_stats(model)} == {"q_proj", "up_proj"}
    model.set_adapter("other")
    drawn(model, seed=3)
    model.train()
    with lora_moe.use_routing(model, task_ids=torch.tensor([0, 1])):
        by_task = model(input_ids=IDS).logits
    model(input_ids=IDS)
    stats = lora_moe.router_stats(model)
    assert {p.rsplit(".")[-1] for p in stats} == {"v_proj"}
    assert all(len(s["load"]) == 2 for s in stats.values())
    assert lora_moe.aux_loss(model).requires_grad
    with lora_moe.use_routing(model, task_ids=torch.tensor([0, 0])):
        assert torch.equal(model(input_ids=IDS).logits[0], by_task[0])
    lora_moe.freeze_experts(model, [1])
    frozen = {m.adapter_name: m.frozen for m in model.modules() if hasattr(m, "adapter_name")}
    assert frozen == {"default": (), "other": (1,)}


def test_two_active_adapters_add_up():
    model = adapted()
    model.add_adapter("other", config(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    drawn(model)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 32)
    one, two = (layer.lora_moe_experts[name] for name in ("default", "other"))
    base = layer.base_layer(x)
    assert torch.allclose(layer(x), one(x, base) + two(x, base) - base, atol=1e-5)
    assert len(lora_moe.injected(model)) == 6


def test_the_base_alone_is_one_block_away():
    model, base = adapted(), logits(llama())
    with_experts = logits(model)
    assert not torch.equal(with_experts, base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning about idle experts
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        with lora_moe.disable_adapters(model):
            assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), with_experts)


def test_a_mixture_is_not_merged_but_unloads():
    model = adapted()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"picks experts per token.*cannot be merged"):
            merge()
    with pytest.raises(ValueError, match="got PEFT's; call the PEFT model's unload"):
        lora_moe.remove(model)
    base = model.unload()
    assert torch.equal(logits(base), logits(llama()))
    assert base.state_dict().keys() == llama().state_dict().keys()
    assert not base._forward_pre_hooks and "generate" not in vars(base)
