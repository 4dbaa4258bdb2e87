"""Training LoRA on an MoE model's own fused experts: statistics, trainers, files, copies."""

import copy
import pickle

import accelerate
import pytest
import torch
import transformers as hf

from lora_moe import (
    LoraMoeConfig,
    LoraMoeExperts,
    LoraMoeLinear,
    aux_loss,
    disable_adapters,
    freeze_experts,
    inject,
    injected,
    load_adapter,
    remove,
    router_stats,
    save_adapter,
    use_routing,
    warm_up,
)
from lora_moe.native_experts import LoraMoeExperts as Native
from lora_moe.routing import Routing

from ..support.models import moes, tiny

every_family = pytest.mark.parametrize("family", moes.FAMILIES)
TOKENS = moes.TOKENS


def test_statistics_are_the_models_decision():
    """router_stats ignores padding; the model's own loss is unchanged; ours is 0, with a warning."""
    model = moes.ours().train()
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    out = model(TOKENS, attention_mask=mask, labels=TOKENS, output_router_logits=True)
    ids = out.router_logits[0].topk(2).indices[mask.flatten().bool()]
    load = torch.bincount(ids.flatten(), minlength=moes.E) / ids.numel()
    stats = router_stats(model)["model.layers.0.mlp.experts"]
    torch.testing.assert_close(stats["load"].float(), load)
    assert stats["entropy"] is None
    assert out.aux_loss > 0
    with pytest.warns(UserWarning, match="the model's own router picks.*output_router_logits=True"):
        assert aux_loss(model) == 0


def test_a_router_trains_as_a_whole():
    model = moes.ours(modules_to_save=("mlp.gate",)).train()
    out = model(TOKENS, labels=TOKENS, output_router_logits=True)
    out.loss.backward()
    gate = model.model.layers[0].mlp.gate.weight
    assert gate.requires_grad and gate.grad.abs().max() > 0
    assert not model.model.layers[0].mlp.experts.base_layer.down_proj.requires_grad


def test_replays_a_decision_and_leaves_the_router_to_the_model():
    model = moes.ours().eval()
    expected = model(TOKENS).logits
    replay = {path: layer.routing for path, layer in injected(model).items()}
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.neg_()
        assert not torch.allclose(model(TOKENS).logits, expected, atol=1e-3)
        with use_routing(model, routing=replay):
            torch.testing.assert_close(model(TOKENS).logits, expected)
    beyond = Routing.from_ids(torch.full((14, 2), moes.E), num_experts=moes.E)
    too_high = pytest.raises(ValueError, match=r"expert ids in \[-1, 4\), got 4")
    with use_routing(model, routing=dict.fromkeys(replay, beyond)), too_high:
        model(TOKENS)
    for said in ({"task_ids": torch.tensor([0, 1])}, {"routing": next(iter(replay.values()))}):
        refused = pytest.raises(ValueError, match="the model's own router picks")
        with refused, use_routing(model, **said):
            pass


def test_frozen_experts_do_not_move():
    model = moes.ours().train()
    layer = next(iter(injected(model).values()))
    freeze_experts(model, [1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    before = {name: t.detach().clone() for name, t in layer.adapter_state().items()}
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    rows = slice(moes.R, 2 * moes.R)
    for name, t in layer.adapter_state().items():
        assert not t.grad[rows].any() and t.grad.any()
        assert torch.equal(t[rows], before[name][rows]) and not torch.equal(t, before[name])


def test_a_plain_trainer_trains_saves_and_resumes(tmp_path):
    """Bit for bit, even if save_pretrained would unfuse the weights, as with Mixtral."""

    def train(model, folder, **options):
        arguments = hf.TrainingArguments(
            str(tmp_path / folder), max_steps=4, save_steps=2, per_device_train_batch_size=2,
            learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = hf.Trainer(model, arguments, train_dataset=tiny.sequences(8))
        trainer.train(**options)
        return model

    start = moes.ours(modules_to_save=("mlp.gate",))
    once = train(copy.deepcopy(start), "once")
    resumed = train(
        copy.deepcopy(start), "two", resume_from_checkpoint=str(tmp_path / "once/checkpoint-2")
    )
    own = start.state_dict()
    for name, value in once.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        trains = "lora_" in name or ".gate." in name
        assert torch.equal(own[name], value) != trains, name


def test_hooks_of_a_device_map_stay(tmp_path):
    model = moes.ours()
    expected = model(TOKENS).logits
    save_adapter(model, tmp_path)
    base = accelerate.dispatch_model(moes.base_of(model), {"": "cpu"}, force_hooks=True)
    assert torch.equal(load_adapter(base, tmp_path)(TOKENS).logits, expected)


def test_our_trainer_reports_the_models_routers(tmp_path):
    from lora_moe.hf import LoraMoeTrainer

    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=1, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    model = moes.ours()
    trainer = LoraMoeTrainer(model, arguments, train_dataset=tiny.sequences(4))
    trainer.train()
    assert trainer.state.log_history[0]["router/max_over_mean"] > 1
    with pytest.raises(ValueError, match="router_learning_rate: expected trainable routers"):
        LoraMoeTrainer(
            model, arguments, router_learning_rate=0.1, train_dataset=tiny.sequences(4)
        ).train()


@every_family
def test_save_load_and_remove(family, tmp_path):
    model = moes.ours(family)
    bare = moes.base_of(model)
    expected, before = model(TOKENS).logits, bare(TOKENS).logits
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(bare), tmp_path)
    assert torch.equal(loaded(TOKENS).logits, expected)
    other = inject(bare, moes.config())
    assert torch.equal(load_adapter(other, tmp_path)(TOKENS).logits, expected)
    assert torch.equal(remove(loaded)(TOKENS).logits, before)
    assert not injected(loaded)


@every_family
def test_save_pretrained_keeps_the_base(family, tmp_path):
    model = moes.ours(family)
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with disable_adapters(model):
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert torch.equal(load_adapter(again, tmp_path)(TOKENS).logits, expected)


def test_warm_up_runs_one_layer_of_a_kind():
    model = moes.ours()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert warm_up(model, tokens=(1, 5)) == 1
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(layer.routing is None for layer in injected(model).values())
    assert all(p.grad is None for p in model.parameters())


def test_copies_pickles_and_state_dicts():
    model = moes.ours()
    expected = model(TOKENS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(TOKENS).logits, expected)
    fresh = inject(moes.base(), moes.config())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(TOKENS).logits, expected)
    fresh.load_state_dict(moes.base_of(model).state_dict(), strict=False)  # the base's own names
    assert torch.equal(fresh(TOKENS).logits, expected)


def test_beside_a_mixture_on_linear_modules(tmp_path):
    """Two configurations in one call: a mixture on attention, LoRAs on the model's own experts."""
    attention = LoraMoeConfig(num_experts=3, r=2, target_modules=("q_proj",))
    model = inject(moes.base(), [attention, moes.config()]).train()
    kinds = {type(layer) for layer in injected(model).values()}
    assert kinds == {LoraMoeLinear, LoraMoeExperts} and Native is LoraMoeExperts
    model(TOKENS, labels=TOKENS)
    assert aux_loss(model) > 0 and len(router_stats(model)) == 4
    with use_routing(model, task_ids=torch.tensor([0, 1])):
        model(TOKENS)
    save_adapter(model, tmp_path)
    assert torch.equal(
        load_adapter(moes.base(), tmp_path)(TOKENS).logits, model.eval()(TOKENS).logits
    )
