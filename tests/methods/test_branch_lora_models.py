"""BranchLoRA in transformers' models: decisions during generation, and the paper's parameter counts."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lora_moe
from lora_moe.methods import branch_lora as bl

from ..support.branch_lora import E, K, R
from ..support.models.architectures import MODELS, build

transformers = pytest.importorskip("transformers")


def llama(**fields):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=24, eos_token_id=None, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def branched(model, targets=("q_proj", "down_proj"), tasks=1, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bl.inject(model, bl.branch_lora(E, R, K, 60.0, target_modules=targets), **options)
    for task in range(tasks):
        bl.begin_task(model)
        for layer in bl.branch_layers(model).values():
            for branch in bl.branches_of(layer):
                nn.init.normal_(branch, std=0.3)
            nn.init.normal_(bl.routers_of(layer)[-1], std=1.0)
        if task + 1 < tasks:
            bl.end_task(model, 0)
    return model


PROMPTS = torch.randint(3, 38, (3, 5), generator=torch.Generator().manual_seed(0))


def test_first_token_of_a_causal_model_warns_and_uses_the_mean():
    with pytest.warns(UserWarning, match="routing by the mean instead"):
        model = llama()
        bl.inject(model, bl.branch_lora(E, R, target_modules=("q_proj",)))
    assert bl.state_of(model)[1].route_by == "mean"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = bl.inject(llama(), bl.branch_lora(target_modules=("q_proj",)), fixed_opening=False)
        assert bl.state_of(kept)[1].route_by == "first"
        config = transformers.BertConfig(
            vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=1,
            intermediate_size=24,
        )  # fmt: skip
        bert = bl.inject(transformers.BertModel(config), bl.branch_lora(target_modules=("query",)))
    assert bl.state_of(bert)[1].route_by == "first"


@pytest.mark.parametrize("route_by", ["first", "mean"])
def test_generation_keeps_the_prompts_decision(route_by):
    model = branched(llama(), route_by=route_by, fixed_opening=False)
    prompt = torch.cat([torch.zeros(3, 2, dtype=torch.long), PROMPTS], 1)
    mask = (prompt > 0).long()
    decided = []
    layer = next(iter(bl.branch_layers(model).values()))
    layer.register_forward_hook(lambda m, args, y: decided.append((args[0].shape[1], m.routing)))
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert [n for n, _ in decided] == [7] + [1] * 5
    first = decided[0][1].indices[::7], decided[0][1].weights[::7]
    assert all(
        torch.equal(r.indices, first[0]) and torch.equal(r.weights, first[1])
        for _, r in decided[1:]
    )
    # the same tokens without a cache, routed by the prompt only
    with torch.no_grad():
        seen = torch.zeros_like(out[:, :-1]).bool()
        seen[:, :7] = mask.bool()
        bl.set_mask(model, seen)
        full = torch.cat([mask, torch.ones(3, 5, dtype=torch.long)], 1)
        positions = (full.cumsum(1) - 1).clamp(min=0)
        logits = model(out[:, :-1], attention_mask=full, position_ids=positions).logits
        bl.set_mask(model, None)
    assert torch.equal(logits[:, 6:].argmax(-1), out[:, 7:])


def test_beams_keep_their_prompts_decision():
    model = branched(llama(), route_by="mean")
    out = model.generate(PROMPTS, max_new_tokens=5, num_beams=3, do_sample=False)
    layer = next(iter(bl.branch_layers(model).values()))
    assert layer.routing.indices.shape == (9, K)
    for prompt, row in zip(PROMPTS, out):
        alone = model.generate(prompt[None], max_new_tokens=5, num_beams=3, do_sample=False)
        assert torch.equal(alone[0], row)


def test_a_cache_of_other_prompts_is_refused():
    model = branched(llama(), route_by="mean")
    cache = model(PROMPTS, use_cache=True).past_key_values
    model(PROMPTS[:2])
    with pytest.raises(ValueError, match="past_key_values: expected the cache of the last 2"):
        model(PROMPTS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("route_by", ["first", "mean"])
def test_answers_do_not_decide(route_by):
    """In training the answer follows the prompt; at test time there is none."""
    model = branched(llama(), route_by=route_by, fixed_opening=False)
    layer = next(iter(bl.branch_layers(model).values()))

    def decision(ids, **more):
        model(ids, **more)
        return layer.routing.weights[:: ids.shape[1]]

    alone = decision(PROMPTS)
    both = torch.cat([PROMPTS, PROMPTS.flip(0)], 1)
    labels = torch.cat([torch.full_like(PROMPTS, -100), PROMPTS.flip(0)], 1)
    assert torch.allclose(decision(both, labels=labels), alone, atol=1e-6)
    if route_by == "mean":
        assert not torch.allclose(decision(both), alone, atol=1e-3)
    # answers without a prompt: the first token decides, which all tokens see
    first = decision(both[:, :1])
    assert torch.allclose(decision(both, labels=both), first, atol=1e-6)


def test_padding_changes_no_decision():
    model = branched(llama(), route_by="mean")
    layer = next(iter(bl.branch_layers(model).values()))
    model(PROMPTS)
    want = layer.routing.weights[::5]
    for pads in (
        torch.cat([torch.zeros(3, 4).long(), PROMPTS], 1),
        nn.functional.pad(PROMPTS, (0, 4)),
    ):
        mask = (pads > 0).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(pads, attention_mask=mask, position_ids=positions)
        assert torch.allclose(layer.routing.weights[::9], want, atol=1e-5)


@pytest.mark.parametrize("route_by", ["first", "token"])
@pytest.mark.parametrize("name", MODELS)
def test_in_models_of_every_kind(name, route_by):
    """The output equals the base's; a step trains the trunk, a router and the picked branches."""
    model, batch, config = build(name)
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"])}
    with torch.no_grad():
        want = model(**batch).logits
    targets = config.target_modules
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bl.inject(model, bl.branch_lora(E, R, K, target_modules=targets), route_by=route_by)
    bl.begin_task(model)
    assert torch.equal(model(**batch).logits, want)
    for layer in bl.branch_layers(model).values():
        for branch in bl.branches_of(layer):
            nn.init.normal_(branch, std=0.2)
    model(**batch).logits.square().mean().backward()
    for path, layer in bl.branch_layers(model).items():
        picked = set(layer.routing.indices.flatten().tolist())
        assert layer.lora_A.grad.any() and bl.routers_of(layer)[0].grad.any(), path
        rows = layer.lora_B.grad.unflatten(0, (E, -1)).flatten(1).any(1)
        assert set(rows.nonzero()[:, 0].tolist()) == picked, path


LLAVA_LINEARS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def llava_7b():
    """LLaVA-1.5-7B's shapes without allocated memory."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=vision, text_config=text)
        )


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_parameters_of_the_paper_on_llava_7b():
    """r = 16 x 8 in all seven linears of 32 layers, with the projector trained: 222.4 M and 349.9 M."""
    ins, outs = 6 * 4096 + 11008, 5 * 4096 + 2 * 11008  # summed over the seven linears
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    model = llava_7b()
    with pytest.warns(UserWarning, match="mean"):
        bl.inject(
            model,
            bl.branch_lora(target_modules=LLAVA_LINEARS),
            modules_to_save=("model.multi_modal_projector",),
        )
    bl.begin_task(model)
    assert len(bl.branch_layers(model)) == 224
    assert trainable(model) == 32 * (16 * ins + 8 * 16 * outs + 8 * ins) + projector == 222_371_840
    assert next(iter(bl.branch_layers(model).values())).scales[0] == 2.0
    bl.end_task(model, 0)
    bl.begin_task(model)
    assert trainable(model) == 222_371_840  # only one router trains at a time

    model = llava_7b()
    lora_moe.inject(model, bl.moelora(target_modules=LLAVA_LINEARS))
    model.model.multi_modal_projector.requires_grad_(True)
    assert trainable(model) == 32 * (128 * (ins + outs) + 8 * ins) + projector == 349_904_896
