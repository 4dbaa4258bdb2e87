"""Saving and loading a mixture with PEFT, with transformers and with its Trainer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import transformers as hf
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model

import lora_moe
from lora_moe.peft import MoeLoraLinear

from ..support.peft_mixtures import IDS, adapted, config, drawn, llama, logits

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["whole", "by-meta"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": [1, 2, 3, 4], "lora_alpha": [1.0, 2.0, 3.0, 4.0], "use_rslora": True},
        {"shared_a": True, "router_bias": True, "selection_bias": True, "temperature": 0.5},
        {"gate": "sigmoid", "renormalize": False, "threshold": 0.4, "rank_pattern": {"q_proj": 2}},
        {"top_k": 1, "target_modules": r".*layers\.0.*(k|v)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "top_p": 0.5},
    ],
    ids=["plain", "unequal", "biases", "sigmoid", "expression", "all-linear"],
)  # fmt: skip
def test_the_same_logits_after_saving_and_loading(tmp_path, fields, low_cpu_mem_usage):
    model = adapted(**fields)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].to_dict() | {"inference_mode": False} == (
        model.peft_config["default"].to_dict()
    )
    assert not any(p.requires_grad for p in loaded.parameters())
    trains = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in trains.parameters())


def test_a_bf16_base_loads_fp32_experts_without_rounding(tmp_path):
    model = drawn(get_peft_model(llama().to(torch.bfloat16), config()))
    model.save_pretrained(tmp_path)
    for low in (False, True):
        base = llama().to(torch.bfloat16)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(logits(loaded), logits(model))


def test_named_adapters_are_saved_and_loaded_each(tmp_path):
    model = adapted()
    model.add_adapter("other", config(num_experts=2, target_modules=["v_proj"]))
    model.set_adapter("other")
    drawn(model, seed=3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "other", adapter_name="renamed")
    assert torch.equal(logits(loaded), logits(model))
    loaded.load_adapter(tmp_path, "first")
    loaded.set_adapter("first")
    model.set_adapter("default")
    assert torch.equal(logits(loaded), logits(model))
    assert "import lora_moe.peft" in (tmp_path / "other/README.md").read_text()


def test_auto_peft_model(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = drawn(get_peft_model(base, config()))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_own_adapter_methods(tmp_path):
    model = llama()
    model.add_adapter(config(), "one")
    model.add_adapter(config(num_experts=2, target_modules=["v_proj"]), "two")
    assert torch.equal(logits(model), logits(llama()))
    drawn(model)
    model.set_adapter("one")
    drawn(model, seed=3)
    expected = logits(model)
    assert model.active_adapters() == ["one"]
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "lora_moe.safetensors").exists()

    loaded = llama()
    loaded.load_adapter(tmp_path)
    assert torch.equal(logits(loaded), expected)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), logits(llama()))
    loaded.enable_adapters()
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    loaded.delete_adapter("default")
    assert torch.equal(logits(loaded), logits(llama()))


def test_frozen_experts_are_saved(tmp_path):
    model = adapted()
    lora_moe.freeze_experts(model, [0, 2])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert {layer.frozen for layer in lora_moe.injected(loaded).values()} == {(0, 2)}
    next(iter(lora_moe.injected(model).values())).frozen = (1,)
    with pytest.raises(ValueError, match="frozen: expected the same experts in every layer"):
        model.save_pretrained(tmp_path)


def classifier():
    return llama(hf.LlamaForSequenceClassification, num_labels=3)


@pytest.mark.parametrize("fields", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["score"]}])
def test_modules_to_save(tmp_path, fields):
    model = drawn(get_peft_model(classifier(), config(**{"task_type": None} | fields)))
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "score" in n]
    assert trained == ["base_model.model.score.modules_to_save.default.weight"]
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(classifier()))
    kept = pytest.raises(
        ValueError, match=r"PEFT keeps the base values of .*score \(modules_to_save\)"
    )
    with kept, lora_moe.disable_adapters(model):
        pass

    lora_moe.save_adapter(model, tmp_path / "ours")
    assert torch.equal(logits(lora_moe.load_adapter(classifier(), tmp_path / "ours")), expected)
    again = get_peft_model(classifier(), config(**{"task_type": None} | fields))
    assert torch.equal(logits(lora_moe.load_adapter(again, tmp_path / "ours")), expected)


def test_save_adapter_writes_the_active_adapter_for_a_bare_model(tmp_path):
    model = adapted()
    model.add_adapter("other", config(num_experts=2, target_modules=["v_proj"]))
    model.set_adapter("other")
    drawn(model, seed=3)
    lora_moe.save_adapter(model, tmp_path)
    (group,) = lora_moe.adapter_info(tmp_path)["adapters"]
    assert group["modules"] == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    loaded = lora_moe.load_adapter(llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    expected = logits(model)
    lora_moe.load_adapter(drawn(model, seed=4), tmp_path)
    assert torch.equal(logits(model), expected)


def test_copies_and_pickles_keep_their_base():
    model = adapted()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), logits(model))
        layer = next(m for m in copied.modules() if isinstance(m, MoeLoraLinear))
        assert layer.lora_moe_experts["default"].base_layer is layer.base_layer


def test_transformers_trainer_saves_and_resumes(tmp_path):
    pytest.importorskip("accelerate")

    class Balanced(hf.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(**inputs)
            return outputs.loss + lora_moe.aux_loss(model)

    def trainer(steps):
        arguments = hf.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2,
            learning_rate=1e-2, lr_scheduler_type="constant", report_to=[], use_cpu=True, seed=0,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
        return Balanced(adapted(), arguments, train_dataset=data)

    whole = trainer(4)
    whole.train()
    trained = logits(whole.model)
    assert not torch.equal(trained, logits(adapted()))
    saved = tmp_path / "checkpoint-4"
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), saved)), trained)
    assert not (saved / "model.safetensors").exists()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.model), trained)
