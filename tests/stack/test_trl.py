"""TRL's trainers with lora_moe.hf.LoraMoeTrainerMixin: SFT, DPO, GRPO on a tiny decoder."""

from __future__ import annotations

import copy
import os

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from lora_moe import LoraMoeConfig, aux_loss, disable_adapters, inject, injected, load_adapter
from lora_moe.hf import LoraMoeTrainerMixin, private
from lora_moe.hf.reference import Reference

from ..support.compare import relative_error
from ..support.models import tiny
from .test_trainer import WEIGHTS, GradientsBeforeTheStep, told


class MoeSFTTrainer(LoraMoeTrainerMixin, SFTTrainer):
    pass


class MoeDPOTrainer(LoraMoeTrainerMixin, DPOTrainer):
    pass


class MoeGRPOTrainer(LoraMoeTrainerMixin, GRPOTrainer):
    pass


PLAIN = {
    "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "report_to": [],
    "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2,
    "bf16": False,
}  # fmt: skip


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


def preferences(count=8):
    rows = tiny.texts(3 * count)
    names = ("prompt", "chosen", "rejected")
    return Dataset.from_dict(dict(zip(names, (rows[i::3] for i in range(3)))))


def numbers(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- SFT -------------------------------------------------------------------------------------------

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
    assert len(numbers(trainer, "mean_token_accuracy")) == 2  # TRL's own metrics are there
    for layer in injected(model).values():
        assert layer.lora_B.any()
    files = set(os.listdir(tmp_path / "checkpoint-2"))
    assert {"lora_moe.safetensors", "tokenizer.json"} <= files and not files & WEIGHTS
    loaded = load_adapter(tiny.base(), tmp_path / "checkpoint-2").eval()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def aux_gradients(trainer_of, **fields):
    """Of the routers in the first step; experts with B = 0 give them no gradient of the task."""
    gradients = GradientsBeforeTheStep()
    model = tiny.model(balance_coef=0.0, z_coef=0.1)
    trainer = trainer_of(model, [gradients], max_steps=1, max_grad_norm=0.0, **fields)
    trainer.train()
    return {n: g for n, g in gradients.found.items() if "router" in n}


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

        # one sequence a batch: without Flash Attention nothing keeps those of a batch apart
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
    from .test_trainer import four_bit

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
    """TRL makes the PeftModel; DPO's reference is that model with its adapter off."""
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


# --- DPO -------------------------------------------------------------------------------------------


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
    assert numbers(ours, "loss")[1] != numbers(ours, "loss")[0]  # and then it moves
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


# --- GRPO ------------------------------------------------------------------------------------------


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


# --- the others that take a reference --------------------------------------------------------------


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


# --- what is private -------------------------------------------------------------------------------


def test_what_we_take_from_trl_is_there():
    import inspect
    import re
    import sys

    makers = "|".join(private.REFERENCE_MAKERS)
    for kind in (DPOTrainer, GRPOTrainer):
        source = inspect.getsource(sys.modules[kind.__module__])
        assert re.search(rf"self\.ref_model = ({makers})\(", source)


def test_making_a_trainer_leaves_trl_as_it_was(tmp_path):
    import sys

    module = sys.modules[DPOTrainer.__module__]
    before = module.create_model_from_path
    dpo(tmp_path, tiny.model())
    assert module.create_model_from_path is before


def test_ours_tells_nothing(tmp_path, recwarn):
    sft(tmp_path, tiny.model(), gradient_checkpointing=True).train()
    assert not told(recwarn.list, "lora_moe")
