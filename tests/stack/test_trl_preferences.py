"""TRL's DPO, GRPO and other trainers with a reference, with lora_moe.hf.LoraMoeTrainerMixin."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from lora_moe import aux_loss, disable_adapters, injected
from lora_moe.hf import LoraMoeTrainerMixin
from lora_moe.hf.reference import Reference

from ..support.compare import relative_error
from ..support.models import tiny
from ..support.trl_trainers import PLAIN, aux_gradients, numbers, preferences


class MoeDPOTrainer(LoraMoeTrainerMixin, DPOTrainer):
    pass


class MoeGRPOTrainer(LoraMoeTrainerMixin, GRPOTrainer):
    pass


def dpo(folder, model, callbacks=None, **fields):
    options = {"ref_model": fields.pop("ref_model")} if "ref_model" in fields else {}
    return MoeDPOTrainer(
        model=model,
        args=DPOConfig(str(folder), **PLAIN | {"max_length": 24} | fields),
        train_dataset=preferences(),
        processing_class=tiny.tokenizer(),
        callbacks=callbacks,
        **options,
    )


@pytest.mark.parametrize("experts", ["fresh", "trained before"])
def test_dpo_refers_to_the_policy_at_the_start_without_a_second_model(tmp_path, experts):
    trained = experts != "fresh"
    ours = dpo(tmp_path, tiny.model(trained=trained))
    assert isinstance(ours.ref_model, Reference) and not list(ours.ref_model.parameters())
    ours.train()
    policy = tiny.model(trained=trained)
    copied = copy.deepcopy(policy).requires_grad_(False)
    second = dpo(tmp_path, policy, ref_model=copied)
    second.train()
    assert numbers(ours, "loss")[0] == pytest.approx(0.6931, abs=1e-3)  # policy = reference
    assert numbers(ours, "loss")[1] != numbers(ours, "loss")[0]  # then it changes
    for key in ("loss", "rewards/margins", "router/aux_loss"):
        assert numbers(ours, key) == pytest.approx(numbers(second, key), rel=1e-5, abs=1e-6)


def test_the_reference_of_fresh_experts_is_the_base_bit_for_bit():
    model = tiny.model()
    reference, ids = Reference(model), torch.arange(3, 11)[None]
    want = tiny.base().eval()(input_ids=ids).logits
    tiny.train_by_hand(model)
    with disable_adapters(model), torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, want)
    got = reference(input_ids=ids).logits
    assert torch.equal(got, want) and not got.requires_grad


def test_the_reference_of_trained_experts_leaves_no_trace():
    model = tiny.model(trained=True, modules_to_save=["lm_head"], selection_bias=True)
    ids = torch.arange(3, 11)[None]
    want = model(input_ids=ids).logits.detach()
    reference = Reference(model)
    tiny.train_by_hand(model, seed=9)
    with torch.no_grad():
        model.lm_head.weight += 1
        for layer in injected(model).values():
            layer.selection_bias += torch.arange(4.0)
    model(input_ids=ids)
    loss, routings = aux_loss(model), [layer.routing for layer in injected(model).values()]
    assert torch.equal(reference(input_ids=ids).logits, want)
    assert all(a.routing is b for a, b in zip(injected(model).values(), routings))
    assert torch.equal(aux_loss(model), loss)
    assert not torch.equal(model(input_ids=ids).logits, want)


def test_dpo_accumulation_does_not_change_the_router_gradient(tmp_path):
    def make(model, callbacks, **fields):
        return dpo(tmp_path, model, callbacks=callbacks, **fields)

    whole = aux_gradients(make, per_device_train_batch_size=8)
    parts = aux_gradients(make, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name, gradient in whole.items():
        assert relative_error(parts[name], gradient) < 1e-5


def test_a_reference_that_should_follow_the_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sync_ref_model: expected False"):
        dpo(tmp_path, tiny.model(), sync_ref_model=True)


@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["no reference", "with a reference"])
def test_grpo(tmp_path, beta):
    def long_words(completions, **_):
        return [float(len(text)) for text in completions]

    model = tiny.model()
    base = copy.deepcopy(model)
    args = GRPOConfig(
        str(tmp_path),
        **PLAIN | {"gradient_accumulation_steps": 2},
        num_generations=4,
        max_completion_length=6,
        beta=beta,
    )
    data = Dataset.from_dict({"prompt": tiny.texts(8)})
    trainer = MoeGRPOTrainer(
        model=model,
        reward_funcs=long_words,
        args=args,
        train_dataset=data,
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    assert len(numbers(trainer, "reward")) == len(numbers(trainer, "router/aux_loss")) == 2
    if beta:
        assert isinstance(trainer.ref_model, Reference)
        assert numbers(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6)
        assert numbers(trainer, "kl")[-1] > 0
        ids = torch.arange(3, 11)[None]
        with torch.no_grad():
            want = base.eval()(input_ids=ids).logits
            got = trainer.ref_model(input_ids=ids).logits
        assert torch.equal(got, want)
    assert all(layer.lora_B.any() for layer in injected(model).values())


@pytest.mark.parametrize("name", ["KTO", "RLOO"])
def test_other_trainers_with_a_reference(tmp_path, name):
    import trl

    trainer_class = getattr(trl, f"{name}Trainer")
    moe = type(f"Moe{name}Trainer", (LoraMoeTrainerMixin, trainer_class), {})
    if name == "KTO":
        rows = preferences(4)
        labels = [True, False] * 4
        completions = [c for pair in zip(rows["chosen"], rows["rejected"]) for c in pair]
        prompts = [p for p in rows["prompt"] for _ in range(2)]
        data = {"prompt": prompts, "completion": completions, "label": labels}
        fields, extra = {"max_length": 24}, {}
    else:
        data = {"prompt": tiny.texts(8)}
        fields = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
        extra = {"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}
    trainer = moe(
        model=tiny.model(),
        args=getattr(trl, f"{name}Config")(str(tmp_path), **PLAIN | fields),
        train_dataset=Dataset.from_dict(data),
        processing_class=tiny.tokenizer(),
        **extra,
    )
    assert isinstance(trainer.ref_model, Reference)
    trainer.train()
    assert len(numbers(trainer, "router/aux_loss")) == 2


def test_making_a_trainer_leaves_trl_as_it_was(tmp_path):
    import sys

    module = sys.modules[DPOTrainer.__module__]
    before = module.create_model_from_path
    dpo(tmp_path, tiny.model())
    assert module.create_model_from_path is before
