"""Padding never counts: in losses, statistics and router gradients."""

from __future__ import annotations

import pytest
import torch
import transformers

from lora_moe import (
    LoraMoeConfig,
    aux_loss,
    injected,
    losses,
    router_stats,
    use_routing,
)
from lora_moe.forward_records import record_of

from ..support.models.llamas import TOKENS, first_layer, gradients, llama, with_experts

REAL = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
LEFT = REAL.flip(1)


def router_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: g for n, g in gradients(model).items() if "router" in n}


def counted(layer):
    mask = record_of(layer).last.tokens.counted()
    return None if mask is None else mask.long()


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_aux_loss_statistics_and_gradients_are_those_without_padding(gate, side):
    config = LoraMoeConfig(
        num_experts=4, r=2, gate=gate, target_modules="all-linear", balance_coef=1.0, z_coef=0.1
    )
    model = with_experts(llama(torch.float64), config).train()
    exact = 1e-12 if side == "right" else 1e-4  # rotary positions are fp32
    model(TOKENS[:, :4])
    want, stats = aux_loss(model), router_stats(model)
    want_gradients = router_gradients(model, want)
    pads, zeros = torch.full((2, 30), 7), torch.zeros(2, 30, dtype=torch.long)
    ones = torch.ones(2, 4, dtype=torch.long)
    order = 1 if side == "right" else -1
    padded = torch.cat([TOKENS[:, :4], pads][::order], 1)
    model(input_ids=padded, attention_mask=torch.cat([ones, zeros][::order], 1))
    got = aux_loss(model)
    torch.testing.assert_close(got, want, rtol=exact, atol=0)
    for name, grad in router_gradients(model, got).items():
        torch.testing.assert_close(grad, want_gradients[name], rtol=1e3 * exact, atol=1e3 * exact)
    for name, one in router_stats(model).items():
        torch.testing.assert_close(one["load"], stats[name]["load"])
        assert one["dead"] == stats[name]["dead"]
        assert one["entropy"] == pytest.approx(stats[name]["entropy"], rel=exact)


LOSSES = {
    "balance": lambda r, **k: losses.load_balance_loss(r, **k),
    "cv": lambda r, **k: losses.cv_squared(r, **k),
    "z": lambda r, **k: losses.z_loss(r, **k),
    "entropy": lambda r, **k: losses.router_entropy(r, **k),
    "label": lambda r, **k: losses.label_loss(r, torch.arange(len(r.lse)) % 4, **k),
    "localized": lambda r, **k: losses.localized_cv_squared(
        r, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1]), **k
    ),
}


def routings(seed=0):
    """(routing of 12 tokens with NaN in padded rows, routing of only the real tokens, mask)."""
    from lora_moe import Routing

    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([1, 1, 1, 0, 1, 0] * 2).bool()
    logits = torch.randn(12, 4, generator=generator, dtype=torch.float64)

    def routing(logits):
        p = logits.softmax(1)
        weights, indices = p.topk(2, 1)
        counts = torch.bincount(indices.flatten(), minlength=4)
        return Routing(indices.int(), weights, counts, logits, p.mean(0), logits.logsumexp(1))

    whole = torch.where(mask[:, None], logits, float("nan")).requires_grad_()
    return routing(whole), routing(logits[mask]), mask


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_rows_that_do_not_count_may_hold_nan(loss):
    padded, real, mask = routings()
    want = (
        loss(real)
        if loss is not LOSSES["label"]
        else losses.label_loss(real, (torch.arange(12) % 4)[mask])
    )
    got = loss(padded, mask=mask)
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got, padded.logits)
    assert grad.isfinite().all() and not grad[~mask].any() and grad[mask].any()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_mask_of_another_length_is_named(loss):
    padded, *_ = routings()
    with pytest.raises(ValueError, match=r"mask: expected \(12,\), .* got \(11,\)"):
        loss(padded, mask=torch.ones(11))


def test_only_padding_is_no_loss():
    model = with_experts().train()
    with use_routing(model, mask=torch.zeros(2, 6)):
        model(TOKENS)
    assert aux_loss(model) == 0
    assert not any(one["load"].any() for one in router_stats(model).values())


def test_a_mask_given_goes_over_the_models_own():
    model = with_experts()
    with use_routing(model, mask=LEFT):
        model(TOKENS, attention_mask=REAL)
    assert torch.equal(counted(first_layer(model)), LEFT.flatten())


def test_the_selection_bias_counts_no_padding():
    config = LoraMoeConfig(num_experts=4, r=2, selection_bias=True, target_modules=("q_proj",))
    with_pads, without = with_experts(config=config), with_experts(config=config)
    tokens = TOKENS[1:]
    without(tokens)
    with_pads(
        torch.cat([tokens, tokens[:, :1].expand(1, 40)], 1),
        attention_mask=torch.arange(46)[None] < 6,
    )
    for model in (with_pads, without):
        losses.update_selection_bias(model, 0.1)
    for a, b in zip(injected(with_pads).values(), injected(without).values(), strict=True):
        assert torch.equal(a.selection_bias, b.selection_bias)


def test_decoding_counts_the_masks_last_columns():
    model = with_experts().eval()
    cache = model(TOKENS, attention_mask=LEFT, use_cache=True).past_key_values
    longer = torch.cat([LEFT, torch.tensor([[1, 0], [1, 1]])], 1)
    model(TOKENS[:, :2], attention_mask=longer, past_key_values=cache)
    assert counted(first_layer(model)).tolist() == [1, 0, 1, 1]


def test_logits_to_keep_counts_the_last_columns():
    config = LoraMoeConfig(num_experts=4, r=2, target_modules=("lm_head",))
    model = with_experts(llama(tie_word_embeddings=False), config)
    model(TOKENS, attention_mask=REAL, logits_to_keep=3)
    assert counted(model.lm_head).tolist() == [1, 0, 0, 1, 1, 1]


def t5():
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart():
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=40, d_model=16, **sizes, **heads)
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize("make, crossing", [(t5, "EncDecAttention"), (bart, "encoder_attn")])
@pytest.mark.parametrize("length", [6, 4])
def test_encoder_decoder_and_cross_attention_have_their_own_masks(make, crossing, length):
    model = with_experts(make()).train()
    decoder = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])[:, :length]
    model(
        input_ids=TOKENS, attention_mask=REAL,
        decoder_input_ids=TOKENS[:, :length], decoder_attention_mask=decoder,
    )  # fmt: skip
    for path, layer in injected(model).items():
        of_states = crossing in path and path.split(".")[-1] in ("k", "v", "k_proj", "v_proj")
        inside = "encoder." in path.replace("decoder.", "") or of_states
        want = REAL if inside else decoder
        assert torch.equal(counted(layer), want.flatten()), path


@pytest.mark.parametrize("mask", [torch.zeros(2, 1, 6, 6), torch.ones(2, 9)], ids=["4-D", "longer"])
def test_a_mask_that_does_not_fit_counts_all_and_is_told_once(mask):
    model = with_experts().train()
    layer = first_layer(model)
    if mask.dim() == 2:  # as in a model that packs its samples
        with use_routing(model, mask=mask[:1]):
            model(TOKENS)
    else:
        model(TOKENS, attention_mask=mask)
    with pytest.warns(UserWarning, match="does not fit an input") as told:
        aux_loss(model)
        router_stats(model)
    assert len(told) == 1 and counted(layer) is None


def test_no_mask_and_a_full_one_are_the_same_to_the_bit():
    model = with_experts().train()
    model(TOKENS)
    want = aux_loss(model)
    model.zero_grad()
    want.backward()
    model(TOKENS, attention_mask=torch.ones_like(TOKENS))
    assert torch.equal(aux_loss(model), want)
