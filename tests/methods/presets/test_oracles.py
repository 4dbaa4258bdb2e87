"""PEFT's X-LoRA with the same weights; frozen experts from PEFT.  More such tests: examples/parity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft

from lora_moe import inject, injected, load_adapter, losses, presets, save_adapter, use_routing

from ...support.models import tiny

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
TARGETS = ["q_proj", "down_proj"]
HIDDEN = 16


def loras(folder):
    """Directories of three LoRAs with random weights and unequal ranks and scales, and their logits."""
    made = []
    for i, (r, alpha) in enumerate([(2, 8), (3, 5), (1, 4)]):
        config = peft.LoraConfig(
            r=r, lora_alpha=alpha, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(tiny.base(0), config).eval()
        g = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
            logits = model(IDS).logits
        model.save_pretrained(folder / str(i))
        made.append((folder / str(i), logits))
    return made


@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("top_k", [None, 2])
def test_xlora_equals_pefts(by_layer, top_k, tmp_path):
    saved = [directory for directory, _ in loras(tmp_path)]
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=HIDDEN,
        adapters={str(i): str(directory) for i, directory in enumerate(saved)},
        xlora_depth=1,
        layerwise_scalings=by_layer,
        softmax_temperature=0.6,
        top_k_lora=top_k,
    )
    base = tiny.base(0)
    base.config.use_cache = False  # required by PEFT
    theirs = peft.get_peft_model(base, config).eval()
    classifier = theirs.base_model.internal_xlora_classifier.layers[-1]
    ours = presets.xlora(HIDDEN, adapters=saved, temperature=0.6, top_k=top_k)
    ours = inject(tiny.base(0), ours).eval()
    presets.two_passes(ours)
    with torch.no_grad():
        nn.init.normal_(classifier.weight, std=2.0)
        nn.init.normal_(classifier.bias)
        n = len(injected(ours)) if by_layer else 1
        weight = classifier.weight.view(n, len(saved), HIDDEN)
        for i, layer in enumerate(injected(ours).values()):
            layer.router_weight.copy_(weight[i if by_layer else 0])
            layer.router_bias.copy_(classifier.bias.view(n, -1)[i if by_layer else 0])
        want, got = theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits
        bare = tiny.base(0)(IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (want - bare).abs().max() > 0.05


@pytest.mark.parametrize("preset", ["meteora", "moa", "xlora"])
def test_adapters_are_frozen_and_the_router_trains(preset, tmp_path):
    saved = loras(tmp_path)
    sizes = {"hidden_size": HIDDEN} if preset == "xlora" else {}
    made = getattr(presets, preset)(adapters=[d for d, _ in saved], **sizes)
    model = inject(tiny.base(0), made)
    if preset == "xlora":
        presets.two_passes(model)
    for i, (_, want) in enumerate(saved):
        with torch.no_grad(), use_routing(model, task_ids=torch.full((2,), i)):
            torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-5)
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"router_weight"} | ({"router_bias"} if preset == "xlora" else set())
    before = {n: p.clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1), []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        if preset != "xlora":
            loss = losses.router_loss(model, losses.label_loss, torch.tensor([2, 1]))
        found.append(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found[-1] < found[0] - 1e-4
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    save_adapter(model, tmp_path / "saved")
    again = load_adapter(tiny.base(0), tmp_path / "saved")
    assert {layer.frozen for layer in injected(again).values()} == {(0, 1, 2)}
