"""A transformers model inside a custom module whose arguments have different names."""

import warnings

import pytest
import torch
import transformers
from torch import nn

from lora_moe import (
    LoraMoeConfig,
    aux_loss,
    inject,
    injected,
    load_adapter,
    remove,
    router_stats,
    use_routing,
)

from ..support.models.llamas import TOKENS, llama, with_experts

MASK = torch.ones_like(TOKENS)
MASK[1, 4:] = 0
IDS = torch.tensor([0, 3])


class Scorer(nn.Module):
    """A wrapper like those of reward models, Lightning modules and sentence encoders."""

    def __init__(self):
        super().__init__()
        self.backbone = llama()

    def forward(self, ids, padding):
        return self.backbone(input_ids=ids, attention_mask=padding).logits


WRAPPERS = {"module": Scorer, "compiled": lambda: torch.compile(llama(), backend="eager")}


def inner(wrapper):
    return getattr(wrapper, "backbone", None) or wrapper._orig_mod


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float()], ids=["int", "bool", "float"])
def test_padding_counts_nowhere(mask):
    wrapper, model = with_experts(Scorer()).train(), with_experts().train()
    wrapper(TOKENS, mask)
    model(TOKENS, attention_mask=MASK)
    want = aux_loss(model)
    assert torch.equal(aux_loss(wrapper), want)
    model(TOKENS)
    assert not torch.equal(aux_loss(model), want)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_generate_tells_beams_apart(kind):
    wrapper, model = with_experts(WRAPPERS[kind]()).eval(), with_experts().eval()
    options = {"num_beams": 2, "max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    with use_routing(wrapper, task_ids=IDS):
        got = inner(wrapper).generate(TOKENS, **options)
    with use_routing(model, task_ids=IDS):
        assert torch.equal(got, model.generate(TOKENS, **options))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_save_pretrained_keeps_the_bases_names(kind, tmp_path):
    wrapper = with_experts(WRAPPERS[kind]()).eval()
    want = inner(wrapper)(TOKENS).logits
    inner(wrapper).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(load_adapter(model, tmp_path)(TOKENS).logits, want)


def test_a_models_own_backbone_saves_itself_too(tmp_path):
    model = with_experts().eval()
    model.model.save_pretrained(tmp_path)
    backbone = transformers.LlamaModel.from_pretrained(tmp_path)
    load_adapter(backbone, tmp_path)
    want = model.model(TOKENS).last_hidden_state
    assert torch.equal(backbone(TOKENS).last_hidden_state, want)


def test_another_batch_is_refused_inside_too():
    wrapper = with_experts(Scorer()).eval()
    with use_routing(wrapper, task_ids=torch.tensor([1])):
        for call in (lambda: wrapper(TOKENS, MASK), lambda: wrapper.backbone(TOKENS)):
            with pytest.raises(ValueError, match="expected 2, one per sample"):
                call()


def test_remove_takes_everything_off():
    wrapper = remove(with_experts(Scorer()))
    for module in wrapper.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not {"generate", "save_pretrained"} & vars(module).keys()


def llava():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=sizes | vision | {"num_hidden_layers": 1, "projection_dim": 16},
            text_config=sizes | {"model_type": "llama", "vocab_size": 40, "num_hidden_layers": 1},
            image_token_index=39,
            vision_feature_layer=-1,
        )
    )


def test_patches_of_an_image_are_not_masked_by_the_text():
    """Five patches, ten text tokens: the last five columns of the mask do not apply to the patches."""
    model = inject(llava(), LoraMoeConfig(num_experts=4, r=2, target_modules=("q_proj",)))
    tokens = torch.cat([torch.full((2, 4), 39), TOKENS], 1)
    mask = torch.cat([torch.ones(2, 4, dtype=torch.long), MASK], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=tokens, pixel_values=torch.randn(2, 3, 8, 8), attention_mask=mask)
        for name, stats in router_stats(model).items():
            ids = injected(model)[name].routing.indices
            kept = ids if "vision" in name else ids[mask.flatten() == 1]
            assert torch.equal(stats["load"], kept.flatten().bincount(minlength=4) / kept.numel())


def xlnet():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
    model = transformers.XLNetModel(transformers.XLNetConfig(**sizes))
    return with_experts(
        model, LoraMoeConfig(num_experts=4, r=2, target_modules=("layer_1",))
    ).eval()


def test_padding_in_a_model_that_puts_the_sequence_first():
    model = xlnet()
    (layer,) = injected(model).values()
    model(TOKENS, attention_mask=MASK)
    (stats,) = router_stats(model).values()
    kept = layer.routing.indices[MASK.T.flatten() == 1]
    assert torch.equal(stats["load"], kept.flatten().bincount(minlength=4) / kept.numel())


@pytest.mark.parametrize("embedded", [False, True], ids=["ids", "embeddings"])
def test_tasks_in_a_model_that_puts_the_sequence_first(embedded):
    model = xlnet()
    given = {"inputs_embeds": model.word_embedding(TOKENS)} if embedded else {"input_ids": TOKENS}
    with use_routing(model, task_ids=IDS):
        both = model(**given).last_hidden_state
    for b, task in enumerate(IDS):
        alone = {name: tensor[b : b + 1] for name, tensor in given.items()}
        with use_routing(model, task_ids=task[None]):
            torch.testing.assert_close(both[b], model(**alone).last_hidden_state[0])
