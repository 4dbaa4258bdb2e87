"""TRL's SFTTrainer with lora_moe.hf.LoraMoeTrainerMixin on a tiny decoder."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOTrainer, SFTConfig, SFTTrainer

from lora_moe import LoraMoeConfig, inject, injected, load_adapter
from lora_moe.hf import LoraMoeTrainerMixin, private

from ..support.compare import relative_error
from ..support.models import tiny
from ..support.trainers import WEIGHTS, told
from ..support.trl_trainers import PLAIN, aux_gradients, numbers, preferences


class MoeSFTTrainer(LoraMoeTrainerMixin, SFTTrainer):
    pass


def sft(folder, model, count=16, trainer=MoeSFTTrainer, callbacks=None, options=None, **fields):
    args = SFTConfig(str(folder), **PLAIN | {"max_length": 16} | fields)
    data = Dataset.from_dict({"text": tiny.texts(count)})
    return trainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        callbacks=callbacks,
        **options or {},
    )


MODES = {
    "padded": {},
    "packing": {"packing": True},
    "padding-free": {"padding_free": True, "max_length": None},
    "label smoothing": {"label_smoothing_factor": 0.1},  # a second forward without gradients
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*flash:UserWarning")
def test_sft_trains_saves_and_loads(tmp_path, mode):
    model = tiny.model()
    trainer = sft(tmp_path, model, save_strategy="steps", save_steps=2, **MODES[mode])
    trainer.train()
    assert len(numbers(trainer, "loss")) == len(numbers(trainer, "router/aux_loss")) == 2
    assert len(numbers(trainer, "mean_token_accuracy")) == 2  # TRL's own metrics are logged
    for layer in injected(model).values():
        assert layer.lora_B.any()
    files = set(os.listdir(tmp_path / "checkpoint-2"))
    assert {"lora_moe.safetensors", "tokenizer.json"} <= files and not files & WEIGHTS
    loaded = load_adapter(tiny.base(), tmp_path / "checkpoint-2").eval()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("mode", ["padded", "padding-free", "label smoothing"])
def test_sft_accumulation_does_not_change_the_router_gradient(tmp_path, mode):
    def make(model, callbacks, **fields):
        return sft(tmp_path, model, count=8, callbacks=callbacks, **MODES[mode] | fields)

    whole = aux_gradients(make, per_device_train_batch_size=8)
    for batch in (2, 1):
        steps = 8 // batch
        parts = aux_gradients(
            make, per_device_train_batch_size=batch, gradient_accumulation_steps=steps
        )
        for name, gradient in whole.items():
            assert gradient.any()
            assert relative_error(parts[name], gradient) < 1e-5, (name, batch)


def test_padding_free_counts_the_same_tokens(tmp_path):
    found = []
    for mode in ("padded", "padding-free"):

        def make(model, callbacks, mode=mode, **fields):
            return sft(tmp_path, model, count=8, callbacks=callbacks, **MODES[mode] | fields)

        # one sequence per batch: without Flash Attention, sequences would attend to each other
        fields = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
        found.append(aux_gradients(make, **fields))
    for name, gradient in found[0].items():
        assert relative_error(found[1][name], gradient) < 1e-5


def test_sft_by_loss_function_reads_the_live_routing(tmp_path):
    """TRL runs a second forward without gradients after the one that trains."""

    def mean_loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().square().mean()

    model = tiny.model(trained=True)
    before = {n: layer.router_weight.detach().clone() for n, layer in injected(model).items()}
    trainer = sft(tmp_path, model, options={"compute_loss_func": mean_loss})
    trainer.train()
    assert all(value > 0 for value in numbers(trainer, "router/aux_loss"))
    for name, layer in injected(model).items():
        assert not torch.equal(layer.router_weight, before[name])


def test_experts_on_a_head_that_trl_reads_are_told(tmp_path):
    """The fused head of SFT uses lm_head's weight without calling it."""
    import trl.trainer.utils

    if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
        pytest.skip("this TRL calls the head")
    model = tiny.model(target_modules=["q_proj", "lm_head"])
    with pytest.warns(UserWarning, match="lm_head.* did not run"):
        sft(tmp_path, model, max_steps=1).train()


def test_peft_config_after_inject_is_told(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    trainer = sft(
        tmp_path, tiny.model(), trainer=SFTTrainer, max_steps=1, options={"peft_config": config}
    )
    with pytest.warns(UserWarning, match="every expert is frozen"):
        trainer.train()


def test_sft_on_a_4_bit_base_keeps_what_trains_in_fp32(tmp_path):
    pytest.importorskip("bitsandbytes")
    from ..support.trainers import four_bit

    model = inject(four_bit(tmp_path), LoraMoeConfig(**tiny.EXPERTS))
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = sft(tmp_path / "out", model)
    for name, parameter in model.named_parameters():
        if name in start:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, start[name]), name
    trainer.train()
    assert all(layer.lora_B.any() for layer in injected(model).values())


def test_sft_with_an_adapter_of_ours_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    methods = pytest.importorskip("lora_moe.peft")
    config = methods.MoeLoraConfig(
        num_experts=4, r=2, top_k=2, target_modules=["q_proj", "down_proj"], z_coef=0.1
    )
    model = peft.get_peft_model(tiny.base(), config)
    trainer = sft(tmp_path, model, save_strategy="steps", save_steps=2)
    trainer.train()
    assert len(numbers(trainer, "router/aux_loss")) == 2
    files = set(os.listdir(tmp_path / "checkpoint-2"))
    assert "adapter_config.json" in files and not files & WEIGHTS
    loaded = peft.PeftModel.from_pretrained(tiny.base(), tmp_path / "checkpoint-2").eval()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_peft_config_with_trls_own_trainer(tmp_path, kind):
    """TRL creates the PeftModel; DPO's reference is that model with its adapter disabled."""
    peft = pytest.importorskip("peft")
    methods = pytest.importorskip("lora_moe.peft")
    config = methods.MoeLoraConfig(
        num_experts=4, r=2, top_k=2, target_modules=["q_proj", "down_proj"],
        balance_coef=0.0, z_coef=0.0,
    )  # fmt: skip
    trainer_of, args_of, data, length = {
        "sft": (SFTTrainer, SFTConfig, Dataset.from_dict({"text": tiny.texts(16)}), 16),
        "dpo": (DPOTrainer, DPOConfig, preferences(), 24),
    }[kind]
    trainer = trainer_of(
        model=tiny.base(),
        args=args_of(str(tmp_path / "run"), **PLAIN | {"max_length": length}),
        train_dataset=data,
        processing_class=tiny.tokenizer(),
        peft_config=config,
    )
    trainer.train()
    if kind == "dpo":
        assert numbers(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-3)
    trainer.save_model(str(tmp_path / "saved"))
    model, ids = trainer.model.eval(), torch.arange(3, 11)[None]
    loaded = peft.PeftModel.from_pretrained(tiny.base(), tmp_path / "saved").eval()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, trained)
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        assert torch.equal(off, tiny.base().eval()(input_ids=ids).logits)
    assert not torch.equal(off, trained)


def test_what_we_take_from_trl_is_there():
    import inspect
    import re
    import sys

    makers = "|".join(private.REFERENCE_MAKERS)
    for kind in (DPOTrainer, GRPOTrainer):
        source = inspect.getsource(sys.modules[kind.__module__])
        assert re.search(rf"self\.ref_model = ({makers})\(", source)


def test_ours_tells_nothing(tmp_path, recwarn):
    sft(tmp_path, tiny.model(), gradient_checkpointing=True).train()
    assert not told(recwarn.list, "lora_moe")
