"""placement="ffn" in transformers' models: train, save, load, generate, checkpoint, compile, remove."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lora_moe import (
    LoraMoeConfig,
    LoraMoeMLP,
    aux_loss,
    inject,
    injected,
    load_adapter,
    losses,
    presets,
    remove,
    router_stats,
    save_adapter,
    use_routing,
)

from ..support.models import families, tiny

FFN = ("gate_proj", "up_proj", "down_proj")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
PRESETS = {
    "mixlora": lambda **f: presets.mixlora(4, 2, 4, **f),
    "mixlora top-p": lambda **f: presets.mixlora(4, 2, 4, top_p=0.5, **f),
    "mixlora switch": lambda **f: presets.mixlora(4, 2, 4, switch=True, **f),
    "llava_mole": lambda **f: presets.llava_mole(4, 2, 4, **f),
}
every_preset = pytest.mark.parametrize("name", PRESETS)


def model(name="mixlora", base=None, trained=True, targets=(*FFN, "q_proj"), **fields):
    made = inject(base or tiny.base(0), PRESETS[name](target_modules=targets, **fields))
    if trained:
        g = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for layer in injected(made).values():
                for tensor in layer.adapter_state().values():
                    nn.init.normal_(tensor, std=0.3, generator=g)
    return made.eval()


def gradients(made):
    return {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name, weights",
    [
        ("mixlora", lambda p: (top := p.topk(2, 1).values) / top.sum(1, keepdim=True)),
        ("mixlora top-p", lambda p: _until(p.sort(1, descending=True).values, 0.5)),
        ("mixlora switch", lambda p: p.topk(1, 1).values),
        ("llava_mole", lambda p: torch.ones(len(p), 1)),
    ],
)
def test_weights_of_the_presets(name, weights):
    layer = model(name).model.layers[0].mlp
    x = torch.randn(7, 16)
    layer(x)
    bias = layer.router_bias if name == "llava_mole" else 0
    p = torch.softmax(x @ layer.router_weight.T + bias, 1)
    torch.testing.assert_close(layer.routing.weights, weights(p))
    assert torch.equal(layer.routing.indices[:, 0].long(), p.argmax(1))


def _until(p, total):
    """Gates, sorted, kept while the sum of the previous ones is less than `total`."""
    return torch.where(p.cumsum(1) - p < total, p, 0)


def test_ffns_and_plain_loras():
    made = model()
    layers = injected(made)
    kinds = {path: type(layer).__name__ for path, layer in layers.items()}
    assert kinds == {
        f"model.layers.{i}.{name}": kind
        for i in range(2)
        for name, kind in (("self_attn.q_proj", "LoraMoeLinear"), ("mlp", "LoraMoeMLP"))
    }
    lora = layers["model.layers.0.self_attn.q_proj"]
    assert (lora.config.num_experts, lora.config.r, lora.scales) == (1, 2, (2.0,))
    x = torch.randn(3, 16)
    want = lora.base_layer(x) + 2 * (x @ lora.lora_A.T) @ lora.lora_B
    torch.testing.assert_close(lora(x), want)
    trained = [n for n, p in made.named_parameters() if p.requires_grad]
    assert all("lora_" in n or "router" in n for n in trained) and len(trained) == 2 * (3 + 7)


@every_preset
def test_a_step_lowers_the_loss(name):
    made = model(name, trained=False).train()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": IDS.where(mask != 0, -100)}
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer, found = torch.optim.Adam(trained, lr=0.01), []
    for _ in range(3):
        found.append(made(**batch).loss)
        (found[-1] + aux_loss(made)).backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert found[2] < found[0] - 1e-4


@every_preset
def test_a_saved_file_gives_the_same_bits(name, tmp_path):
    made = model(name)
    save_adapter(made, tmp_path)
    again = load_adapter(tiny.base(0), tmp_path).eval()
    assert torch.equal(again(IDS).logits, made(IDS).logits)
    assert [type(m) for m in injected(again).values()] == [type(m) for m in injected(made).values()]
    other = load_adapter(model(name, trained=False), tmp_path).eval()
    assert torch.equal(other(IDS).logits, made(IDS).logits)


@every_preset
def test_generate_with_a_cache_is_the_full_forward(name):
    made = model(name)
    out = made.generate(
        IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True, attention_mask=torch.ones_like(IDS),
    )  # fmt: skip
    with torch.no_grad():
        whole = made(out.sequences[:, :-1], use_cache=False).logits[:, 3:]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_recompute_the_same(reentrant):
    found = []
    for checkpointed in (False, True):
        made = model().train()
        if checkpointed:
            made.enable_input_require_grads()
            made.gradient_checkpointing_enable({"use_reentrant": reentrant})
        made(input_ids=IDS, labels=IDS).loss.backward()
        found.append(gradients(made))
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-4, atol=1e-7)


def test_compiled_without_graph_breaks():
    made = model("mixlora")
    layer = made.model.layers[0].mlp
    x = torch.randn(2, 3, 16, requires_grad=True)
    want, compiled = layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    torch.testing.assert_close(got, want)
    (a,) = torch.autograd.grad(want.sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(b, a)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(made, backend="aot_eager")(IDS).logits, made(IDS).logits
        )


def test_losses_and_statistics_are_those_of_the_shared_router():
    made = model("mixlora", balance_coef=0.5)
    x = torch.randn(1, 6, 16)
    layer = made.model.layers[0].mlp
    made(IDS)
    ffns = {path: m for path, m in injected(made).items() if isinstance(m, LoraMoeMLP)}
    want = sum(0.5 * losses.load_balance_loss(m.routing) for m in ffns.values())
    torch.testing.assert_close(aux_loss(made), want / len(ffns))  # plain LoRAs have no such loss
    assert router_stats(made).keys() >= ffns.keys()
    p = torch.softmax(x.view(-1, 16) @ layer.router_weight.T, 1)
    layer(x)
    assert torch.equal(layer.routing.indices.long(), p.topk(2, 1).indices)


def test_padding_is_not_counted():
    made = model("mixlora", balance_coef=0.5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    made(IDS, attention_mask=mask)
    layer = made.model.layers[0].mlp
    want = losses.load_balance_loss(layer.routing, mask.view(-1))
    other = losses.load_balance_loss(made.model.layers[1].mlp.routing, mask.view(-1))
    torch.testing.assert_close(aux_loss(made), 0.5 * (want + other) / 2)
    counts = losses.counts_of(layer.routing, mask.view(-1))
    assert counts.sum() == 12 and layer.routing.counts.sum() == 16
    load = router_stats(made)["model.layers.0.mlp"]["load"]
    torch.testing.assert_close(load, counts / counts.sum())


def test_the_callers_tasks_are_experts():
    made = model("mixlora", targets=FFN)
    with use_routing(made, task_ids=torch.tensor([1, -1])):
        got = made(IDS).logits
    assert torch.equal(got[1], tiny.base(0).eval()(IDS).logits[1])
    assert not torch.equal(got[0], made(IDS).logits[0])


@pytest.mark.parametrize(
    "family",
    ["gpt2", "phi3", "bloom", "falcon", "t5", "modernbert", "clip", "wavlm", "deepseek-v3"],
)
def test_ffns_of_other_families(family):
    torch.manual_seed(0)
    made, batch = families.FAMILIES[family]()
    want = made.eval()(**batch)[0]
    inject(made, presets.mixlora(3, 2, target_modules="all-linear"))
    ffns = {path: m for path, m in injected(made).items() if isinstance(m, LoraMoeMLP)}
    assert len(ffns) >= 2 and not any("attention" in path for path in ffns)
    torch.testing.assert_close(made(**batch)[0], want, rtol=1e-5, atol=1e-5)
    for layer in ffns.values():
        for tensor in layer.adapter_state().values():
            nn.init.normal_(tensor, std=0.3)
    got = made(**batch)[0]
    assert (got - want).abs().max() > 1e-3
    got.sum().backward()
    for layer in ffns.values():
        assert all(t.grad.isfinite().all() and t.grad.any() for pair in layer.pairs() for t in pair)


@pytest.mark.parametrize("family", ["bart", "opt", "whisper", "bert", "mixtral", "mamba"])
def test_models_whose_ffn_is_no_module_are_refused(family):
    made, _ = families.FAMILIES[family]()
    with pytest.raises(ValueError, match="expected linear layers of an FFN with placement='ffn'"):
        inject(made, presets.mixlora(3, 2, target_modules="all-linear"))


def test_removed_it_is_the_base_again():
    base = tiny.base(0).eval()
    want, names = base(IDS).logits, list(base.state_dict())
    made = remove(model(base=base))
    assert torch.equal(made(IDS).logits, want) and list(made.state_dict()) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())
    again = model(base=made)
    assert not torch.equal(again(IDS).logits, want)


def test_copies_are_independent():
    made = model()
    want, other = made(IDS).logits, copy.deepcopy(made)
    for layer in injected(other).values():
        for _, lora_B in layer.pairs():
            nn.init.zeros_(lora_B)
    assert torch.equal(made(IDS).logits, want)
    torch.testing.assert_close(
        other(IDS).logits, tiny.base(0).eval()(IDS).logits, atol=1e-6, rtol=1e-5
    )


def test_trainer_trains_saves_and_resumes(tmp_path):
    made = model("mixlora", trained=False)
    options = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps"}
    args = TrainingArguments(
        tmp_path, max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, **options
    )  # fmt: skip
    data = tiny.sequences(16)
    Trainer(made, args, train_dataset=data).train()
    again = model("mixlora", trained=False)
    Trainer(again, args, train_dataset=data).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    for (name, a), b in zip(made.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7, msg=name)
    made.save_pretrained(tmp_path / "whole")
    reloaded = load_adapter(
        type(made).from_pretrained(tmp_path / "whole", dtype=torch.float32), tmp_path / "whole"
    ).eval()
    torch.testing.assert_close(reloaded(IDS).logits, made.eval()(IDS).logits)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"target_modules": ("q_proj",)}, "expected linear layers of an FFN with placement='ffn'"),
        ({"target_modules": FFN, "middle": {"kind": "slots"}}, "middle: expected None"),
        (
            {"target_modules": (*FFN, "q_proj"), "r": (1, 2, 3, 4)},
            "r, alpha: expected the same for all",
        ),
        ({"placement": "attention"}, "placement: expected one of"),
    ],
)
def test_what_cannot_be_placed_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        inject(tiny.base(0), LoraMoeConfig(**{"num_experts": 4, "placement": "ffn"} | fields))


def test_a_file_for_other_ffns_is_refused(tmp_path):
    save_adapter(model(), tmp_path)
    wide = tiny.base(0, intermediate_size=28)
    with pytest.raises(ValueError, match=r"gate_proj.lora_B"):
        load_adapter(wide, tmp_path)
    without = tiny.base(0)
    without.model.layers[0].mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"layers.0.mlp: a Identity is not an FFN"):
        load_adapter(without, tmp_path)
