"""Experts in all linears of 33 model families: what each of them must support.

The modules that "all-linear" leaves out are recorded per family, so that changes are noticed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, aux_loss, inject, injected, load_adapter, save_adapter

from ..support.compare import relative_error

pytest.importorskip("transformers")

from ..support.models.families import FAMILIES

CONFIG = LoraMoeConfig(num_experts=4, r=2, alpha=4, target_modules="all-linear")
# leaf names of linear-like modules that have no experts, besides the output embedding
HEADS = {"lm_head", "decoder", "proj_out", "classifier"}
LEFT_OUT = {
    "mixtral": {"gate"}, "qwen3-moe": {"gate"}, "deepseek-v3": {"gate"}, "gpt-oss": {"router"},
    "mamba": {"x_proj", "dt_proj", "out_proj"}, "mamba2": {"out_proj"},
    "wavlm": {"q_proj", "k_proj", "v_proj", "out_proj"},
}  # fmt: skip
ENCODERS = {"bert", "roberta", "modernbert", "deberta-v2", "vit", "clip", "wavlm"}
GENERATORS = sorted(FAMILIES.keys() - ENCODERS)
# decoders whose answer must not depend on left padding
PADDED = sorted(FAMILIES.keys() - ENCODERS - {"t5", "bart", "whisper"})


@functools.cache
def built(family):
    torch.manual_seed(0)
    model, batch = FAMILIES[family]()
    for parameter in model.parameters():  # with the usual std of 0.02 all logits would be similar
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval(), batch


@functools.cache
def prepared(family):
    """The family's model with experts that affect the output; shared by tests, which must not modify it."""
    model, batch = copy.deepcopy(built(family))
    inject(model, CONFIG)
    generator = torch.Generator().manual_seed(1)
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B, std=0.3, generator=generator)
        nn.init.normal_(layer.router_weight, std=0.3, generator=generator)
    return model, batch


def answer(model, batch):
    """The logits, or the corresponding output, as one tensor."""
    output = model(**batch)
    return output.logits if "logits" in output else output.logits_per_image


every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_all_linears_but_what_cannot_take_experts(family):
    model, _ = prepared(family)
    linear = {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        or type(module).__name__ == "Conv1D"
        or type(module).__name__.endswith("Router")
    }
    left = {name.rpartition(".")[2] for name in linear.keys() - injected(model).keys()}
    assert left - HEADS == LEFT_OUT.get(family, set())
    assert injected(model).keys() <= linear.keys()


@every_family
def test_every_expert_that_ran_gets_a_finite_nonzero_gradient(family):
    model, batch = prepared(family)
    model.zero_grad()
    for layer in injected(model).values():
        layer.routing = None
    with upstream_gradients(model) as upstream:
        (answer(model, batch).square().mean() + aux_loss(model)).backward()
    for name, layer in injected(model).items():
        assert layer.routing is not None, f"{name} has not run"
        # the last layer of an image encoder drops tokens; a first token attends only to itself
        matters = upstream[name].flatten(0, -2).any(1)
        ids = layer.routing.indices[matters].unique()
        ran = torch.zeros(layer.config.num_experts, dtype=bool).index_fill(0, ids.long(), True)
        assert ran.any(), name
        for parameter in (layer.lora_A, layer.lora_B):
            per_expert = parameter.grad.unflatten(0, (-1, layer.config.r)).flatten(1)
            assert per_expert.isfinite().all(), name
            assert torch.equal(per_expert.any(1), ran), name
        assert layer.router_weight.grad.isfinite().all() and layer.router_weight.grad.any(), name


@contextlib.contextmanager
def upstream_gradients(model):
    """Yields {layer: gradient of its output}, filled by a backward inside the block."""
    found = {}

    def hook_of(name):
        def hook(layer, args, y):
            y = y.clone()  # Falcon adds to it in place
            y.register_hook(lambda gradient: found.__setitem__(name, gradient))
            return y

        return hook

    handles = [m.register_forward_hook(hook_of(name)) for name, m in injected(model).items()]
    yield found
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", GENERATORS)
def test_cached_generation_equals_greedy_decoding_without_a_cache(family):
    model, batch = prepared(family)
    batch = {k: v for k, v in batch.items() if not k.startswith("decoder")}
    cached, plain = (
        model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)
    base = built(family)[0].generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert not torch.equal(cached, base)  # the experts affect the output


@pytest.mark.parametrize("family", PADDED)
def test_left_padding_changes_no_answer(family):
    model, batch = prepared(family)
    padded = {name: to_the_left(t) if name in PER_TOKEN else t for name, t in batch.items()}
    mask = to_the_left(torch.ones_like(batch["input_ids"]))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = model.generate(**batch, attention_mask=mask[:, PAD:], **options)
    got = model.generate(**padded, attention_mask=mask, **options)
    assert torch.equal(got[:, PAD:], want)
    if family != "qwen2-vl":  # has 3-D positions, which generate has just set
        placed = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            logits = model(
                **padded, attention_mask=mask, **placed if takes_positions(model) else {}
            )
            assert relative_error(logits.logits[:, PAD:], model(**batch).logits) < 1e-5


PAD = 3
PER_TOKEN = ("input_ids", "mm_token_type_ids")


def to_the_left(tokens):
    return nn.functional.pad(tokens, (PAD, 0))


def takes_positions(model):
    return "position_ids" in inspect.signature(model.forward).parameters


@every_family
def test_a_saved_adapter_gives_the_same_bits_in_a_fresh_model(family, tmp_path):
    model, batch = prepared(family)
    save_adapter(model, tmp_path)
    fresh = copy.deepcopy(built(family)[0])
    with torch.no_grad():
        want, base = answer(model, batch), answer(fresh, batch)
        load_adapter(fresh, tmp_path)
        assert injected(fresh).keys() == injected(model).keys()
        assert torch.equal(answer(fresh, batch), want)
        assert relative_error(base, want) > 1e-2
