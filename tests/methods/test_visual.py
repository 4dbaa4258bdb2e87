"""The gated visual adapter against its formulas, and in models whose outputs it must not change at first."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_moe.methods.c_lorae import visual
from lora_moe.methods.c_lorae.visual import GatedVisual

from ..support.compare import relative_error

transformers = pytest.importorskip("transformers")
B, L, P, D, D_V = 3, 4, 5, 16, 10
G = torch.Generator().manual_seed(0)
IMAGES = torch.randn(B, P, D_V, generator=G)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
WORDS = torch.randint(3, 38, (B, L), generator=G)


def adapter(mode, gate=0.7):
    torch.manual_seed(0)
    module = GatedVisual(D, D_V, mode, heads=2, head_width=3).double()
    nn.init.constant_(module.gate, gate)
    return module


def by_loops(m, h, images, mask):
    """In loops over samples, tokens and heads."""
    out = h.clone()
    for b in range(B):
        v = images[b][mask[b]]  # (patches, D_v)
        if m.mode == "addition":
            out[b] += torch.tanh(m.gate) * (m.value.weight @ v.mean(0) + m.value.bias)
            continue
        for t in range(L):
            x = h[b, t]
            x = x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt() * m.norm.weight
            heads = []
            for a in (slice(0, 3), slice(3, 6)):
                q = m.query.weight[a] @ x
                scores = torch.stack([q @ (m.key.weight[a] @ patch) for patch in v]) / 3**0.5
                values = torch.stack([m.value.weight[a] @ patch for patch in v])
                heads.append(scores.softmax(0) @ values)
            out[b, t] += torch.tanh(m.gate) * (m.out.weight @ torch.cat(heads))
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", visual.MODES)
def test_equals_the_formula_forward_and_backward(mode, masked):
    m, h = adapter(mode), torch.randn(B, L, D, generator=G, dtype=torch.float64)
    m.images, m.mask = IMAGES.double(), MASK if masked else None
    mask = MASK if masked else torch.ones_like(MASK)
    h = h.requires_grad_()
    leaves = [h, *m.parameters()]
    dy = torch.randn(B, L, D, generator=G, dtype=torch.float64)
    ours, truth = m(h), by_loops(m, h, IMAGES.double(), mask)
    assert relative_error(ours, truth) < 1e-12
    pairs = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for y in (ours, truth))
    for one, other in zip(*pairs, strict=True):
        assert relative_error(one, other) < 1e-11


def llama():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=D, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), ("model.layers.0", "model.layers.1")


def t5():
    config = transformers.T5Config(
        vocab_size=40,
        d_model=D,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    blocks = ("encoder.block.0", "encoder.block.1")
    return transformers.T5ForConditionalGeneration(config).eval(), blocks


def run(model):
    inputs = {"decoder_input_ids": WORDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=WORDS, **inputs).logits


@pytest.mark.parametrize("mode", visual.MODES)
@pytest.mark.parametrize("build", [llama, t5])
def test_a_model_starts_unchanged_and_then_uses_images(build, mode):
    torch.manual_seed(0)
    model, blocks = build()
    plain, names = run(model), {n for n, _ in model.named_parameters()}
    visual.add_visual(model, blocks, D_V, mode=mode)
    assert names < {n for n, _ in model.named_parameters()}  # no parameter was renamed
    assert torch.equal(run(model), plain)
    visual.set_images(model, IMAGES, MASK)
    y = run(model)
    assert torch.equal(y, plain)  # bit for bit, as the gates are zero
    y.square().sum().backward()
    assert all(model.get_submodule(path).visual.gate.grad for path in blocks)
    for path in blocks:
        nn.init.ones_(model.get_submodule(path).visual.gate)
    changed = (run(model) - plain).flatten(1).abs().amax(1)
    assert (changed > 1e-3).all()
    moved = IMAGES.clone()
    moved[2, 0] += 1  # a patch that the mask hides
    moved[1, 0] += 1  # a patch that it shows
    before = run(model)
    visual.set_images(model, moved, MASK)
    assert (run(model) != before).flatten(1).any(1).tolist() == [False, True, False]
    visual.set_images(model, None)
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_use_their_own_adapters(duplicate):
    model, blocks = llama()
    visual.add_visual(model, blocks, D_V)
    other = duplicate(model)
    visual.set_images(other, IMAGES)
    assert model.model.layers[0].visual.images is None
    before = run(other)
    nn.init.ones_(model.model.layers[0].visual.gate)
    assert torch.equal(run(other), before)
    nn.init.ones_(other.model.layers[0].visual.gate)
    assert not torch.equal(run(other), before)


def test_refused_arguments():
    model, blocks = llama()
    with pytest.raises(ValueError, match=r"blocks: expected paths .*'model.layers.7'"):
        visual.add_visual(model, ("model.layers.7",), D_V)
    with pytest.raises(ValueError, match="blocks"):
        visual.add_visual(model, (), D_V)
    with pytest.raises(ValueError, match="mode: expected one of"):
        visual.add_visual(model, blocks, D_V, mode="concat")
    with pytest.raises(ValueError, match="image_width: expected a positive integer, got 0"):
        visual.add_visual(model, blocks, 0)
    with pytest.raises(ValueError, match="GatedVisual"):
        visual.set_images(model, IMAGES)
    visual.add_visual(model, blocks, D_V)
    with pytest.raises(ValueError, match="without a `visual`"):
        visual.add_visual(model, blocks, D_V)
    with pytest.raises(ValueError, match=r"images: expected \(B, P, 10\), got \(3, 5, 9\)"):
        visual.set_images(model, IMAGES[..., :9])
    with pytest.raises(ValueError, match=r"mask: expected \(B, P\)"):
        visual.set_images(model, IMAGES, MASK[:2])
    visual.set_images(model, IMAGES[:2])
    with pytest.raises(ValueError, match="images: expected 3, one per sample"):
        run(model)
