"""Heads, embeddings and buffers besides the experts: saved, or refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lora_moe import (
    LoraMoeConfig,
    inject,
    load_adapter,
    save_adapter,
)

from ..support.models.llamas import TOKENS, llama, with_experts


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def classifier():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=1,
        intermediate_size=24, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    return transformers.LlamaForSequenceClassification(config)


def test_a_head_trains_and_is_saved(tmp_path):
    config = LoraMoeConfig(
        num_experts=2, r=2, target_modules="all-linear", modules_to_save={"score"}
    )
    model = inject(classifier(), config)
    assert model.score.weight.requires_grad and type(model.score) is nn.Linear
    with torch.no_grad():
        model.score.weight.add_(1)
    save_adapter(model, tmp_path)
    fresh = load_adapter(classifier(), tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert fresh.score.weight.requires_grad
    trained = {n for n, p in fresh.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    again = inject(classifier(), config)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_embeddings_that_two_modules_share_are_saved_once(tmp_path):
    config = LoraMoeConfig(
        r=2, target_modules=("q_proj",), modules_to_save=("embed_tokens", "lm_head")
    )
    model = inject(llama(tie_word_embeddings=True), config)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save_adapter(model, tmp_path)
    fresh = load_adapter(llama(tie_word_embeddings=True), tmp_path)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)


def test_what_trains_and_would_be_lost_is_told(tmp_path):
    model = with_experts()
    model.lm_head.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"lm_head.weight .*modules_to_save"):
        save_adapter(model, tmp_path)


class Regressor(nn.Module):
    def __init__(self, head=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 8)
        self.head = head or nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    def forward(self, x):
        return self.head(self.body(x))


def regressor(head=None, modules_to_save=("head",)):
    config = LoraMoeConfig(
        r=2, target_modules=("body",), balance_coef=0, z_coef=0, modules_to_save=modules_to_save
    )
    return inject(Regressor(head), config)


def test_buffers_of_a_head_are_saved(tmp_path):
    """BatchNorm counts its batches in an int64."""
    model = regressor().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(6, 8)).square().mean().backward()
        optimizer.step()
    save_adapter(model, tmp_path)
    fresh = load_adapter(Regressor(), tmp_path)
    assert fresh.head[1].num_batches_tracked == 3
    assert all(
        torch.equal(t, fresh.state_dict()[n]) for n, t in model.state_dict().items() if "head" in n
    )


class Buffers(nn.Module):
    """Integer buffers of each dtype, a 0-dim one, an empty one, and a transposed weight."""

    def __init__(self, sign=1):
        super().__init__()
        self.weight = nn.Parameter(sign * torch.randn(1, 8).t())
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            self.register_buffer(
                str(dtype).partition(".")[2], torch.arange(3).to(dtype) + (sign > 0)
            )
        self.register_buffer("bool", torch.tensor([True, False, sign > 0]))
        self.register_buffer("step", torch.tensor(sign + 5))
        self.register_buffer("empty", torch.zeros(0, 3))

    def forward(self, x):
        return x @ self.weight


def test_whole_numbers_of_each_kind_are_saved(tmp_path):
    model = regressor(Buffers())
    save_adapter(model, tmp_path)
    fresh = load_adapter(Regressor(Buffers(-1)), tmp_path)
    want, got = model.head.state_dict(), fresh.head.state_dict()
    assert all(got[n].dtype == t.dtype and torch.equal(got[n], t) for n, t in want.items())


def test_whole_numbers_are_not_converted(tmp_path):
    save_adapter(regressor(Buffers()), tmp_path)
    other = Regressor(Buffers())
    other.head.int64 = other.head.int64.float()
    with pytest.raises(ValueError, match=r"head.int64: expected one of \['F64', .*got 'I64'"):
        load_adapter(other, tmp_path)


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"scale": 1.0}


def test_a_head_with_extra_state_is_refused():
    with pytest.raises(ValueError, match="head with a Stateful, which has extra state"):
        regressor(Stateful(8, 1))


def test_a_head_that_the_file_does_not_hold_is_told(tmp_path):
    save_adapter(regressor(modules_to_save=()), tmp_path)
    with pytest.warns(UserWarning, match="head .*of modules_to_save are not in the file"):
        load_adapter(regressor(), tmp_path)


@pytest.mark.parametrize(
    "names, message",
    [
        (("scoer",), "got 'scoer'"),
        ("score", r"for one name write \('score',\)"),
        (("q_proj",), "expected modules without targets"),
    ],
    ids=["typo", "text", "a-target"],
)
def test_wrong_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        config = LoraMoeConfig(r=2, target_modules=("q_proj",), modules_to_save=names)
        inject(classifier(), config)
