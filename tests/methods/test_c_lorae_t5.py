"""C-LoRAE in a T5: it trains, generates, saves and loads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import lora_moe
from lora_moe.methods import c_lorae
from lora_moe.methods.c_lorae import CLoraeConfig, add_visual, set_images

from ..support.c_lorae import fp64
from ..support.compare import relative_error

transformers = pytest.importorskip("transformers")
T5_LINEARS = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
WORDS = torch.randint(3, 38, (6, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([0, 1, 0, 1, 0, 1])
OF_T5 = CLoraeConfig(num_tasks=2, r=8, alpha=8, mutual_information=True, target_modules=T5_LINEARS)


def t5(config=None, seed=0):
    torch.manual_seed(seed)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    add_visual(model, ("encoder.block.0", "encoder.block.1"), 12, heads=2, head_width=8)
    return c_lorae.inject(model, config or OF_T5).eval()


def answers():
    """Four tokens and the end token: from the words for task 0, from the image for task 1."""
    seen = 3 + (IMAGES.sum((1, 2)) > 0).long()
    first = torch.where(IDS == 0, WORDS[:, 0], seen)
    return torch.stack([first, first, WORDS[:, 1], torch.ones_like(first)], 1)


def give(model, n=6):
    c_lorae.set_tasks(model, IDS[:n])
    set_images(model, IMAGES[:n])


def test_t5_trains_and_generates():
    model = t5()
    untouched = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert len(c_lorae.layers_of(model)) == 2 * (4 + 8) + 2 * (3 + 3)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    give(model)
    trace = []
    for _ in range(150):
        loss = model(input_ids=WORDS, labels=answers()).loss
        trace.append(loss.item())
        (loss + 0.01 * c_lorae.mutual_information_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trace[-1] < 0.1 * trace[0]
    assert all(torch.equal(p, untouched[n]) for n, p in model.named_parameters() if n in untouched)
    said = model.generate(input_ids=WORDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(said[:, 1:], answers())
    beams = model.generate(input_ids=WORDS, max_new_tokens=4, do_sample=False, num_beams=3)
    assert torch.equal(beams[:, 1:5], answers())


def randomised(model):
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return model


@torch.no_grad()
def logits(model):
    give(model)
    return model(input_ids=WORDS, decoder_input_ids=answers()).logits


def test_tasks_and_images_matter_sample_by_sample():
    model = randomised(t5())
    whole = logits(model)
    c_lorae.set_tasks(model, IDS[[1, 0, 2, 3, 4, 5]])
    moved = model(input_ids=WORDS, decoder_input_ids=answers()).logits
    changed = (moved - whole).flatten(1).abs().amax(1) > 1e-3
    assert changed.tolist() == [True, True, False, False, False, False]


@fp64
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_in_t5(reentrant):
    def gradients(checkpointed):
        model = randomised(t5()).double().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        give(model)
        model(input_ids=WORDS, labels=answers(), use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    torch.manual_seed(0)
    plain = gradients(False)
    torch.manual_seed(0)
    for name, grad in gradients(True).items():
        assert relative_error(grad, plain[name]) < 1e-10, name


def test_decoder_generation_equals_its_forward():
    """Token by token with a cache, against one forward."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=24, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    add_visual(model, ("model.layers.1",), 12, heads=2, head_width=8)
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    c_lorae.inject(model, CLoraeConfig(num_tasks=2, r=4, alpha=4, target_modules=linears))
    randomised(model)
    give(model)
    out = model.generate(input_ids=WORDS, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        whole = model(input_ids=out).logits.argmax(-1)
    assert torch.equal(out[:, 7:], whole[:, 6:-1])


def test_save_and_load(tmp_path):
    model = randomised(t5())
    path = c_lorae.save(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] == ["c_lorae.safetensors"]
    other = c_lorae.load(t5(), tmp_path)
    assert torch.equal(logits(model), logits(other))


def test_load_in_the_middle_of_training_continues_bit_for_bit(tmp_path):
    def train(model, optimizer, steps):
        give(model)
        for _ in range(steps):
            model(input_ids=WORDS, labels=answers()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        model = t5()
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.Adam(trained, lr=1e-2)

    whole, optimizer = fresh()
    train(whole, optimizer, 6)
    half, optimizer = fresh()
    train(half, optimizer, 3)
    c_lorae.save(half, tmp_path)
    resumed, other = fresh()
    c_lorae.load(resumed, tmp_path)
    other.load_state_dict(optimizer.state_dict())
    train(resumed, other, 3)
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "sigmoid"}, "the model has .*sigmoid.*, the file .*softmax"),
        ({"gate": "sum"}, "sum"),
        ({"r": 6}, "ranks"),
        ({"alpha": 9.0}, "scales"),
        ({"task_alpha": 2.0}, "scales"),
        ({"target_modules": ("q", "v")}, "the model has None"),
    ],
)
def test_another_models_file_is_refused_and_nothing_changes(tmp_path, change, message):
    c_lorae.save(randomised(t5()), tmp_path)
    other = t5(dataclasses.replace(OF_T5, **change))
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(ValueError, match=message):
        c_lorae.load(other, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())


def test_damaged_files_are_refused(tmp_path):
    model = randomised(t5())
    path = c_lorae.save(model, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="without gaps"):
        c_lorae.load(t5(), tmp_path)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
    c_lorae.save(model, tmp_path)
    with pytest.raises(ValueError, match="finite"):
        c_lorae.load(t5(), tmp_path)
    other = lora_moe.inject(
        nn.Sequential(nn.Linear(4, 4)), lora_moe.LoraMoeConfig(target_modules=("0",))
    )
    lora_moe.save_adapter(other, tmp_path)
    (tmp_path / "lora_moe.safetensors").rename(path)
    with pytest.raises(ValueError, match="expected c_lorae in its metadata"):
        c_lorae.load(t5(), tmp_path)
    with pytest.raises(ValueError, match="experts or GatedVisual"):
        c_lorae.save(nn.Linear(2, 2), tmp_path)
