"""Inside Hugging Face models with random weights and a few thousand parameters; no downloads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_moe import (
    LoraMoeConfig,
    aux_loss,
    inject,
    injected,
    load_adapter,
    remove,
    save_adapter,
    set_routing,
)

from ..support.compare import relative_error
from ..support.models.architectures import ATTENTION, EXPERTS, MODELS, SIZES, build

transformers = pytest.importorskip("transformers")
every_model = pytest.mark.parametrize("name", MODELS)
GENERATORS = ("llama", "t5", "gpt2", "llava")


def randomise(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B, std=0.5, generator=g)
        nn.init.normal_(layer.router_weight, std=0.5, generator=g)


def ready(name, **fields):
    model, batch, config = build(name, **fields)
    inject(model, config)
    randomise(model)
    return model, batch


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).logits.square().mean() + aux_loss(model)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@every_model
def test_starts_as_the_base_bit_for_bit(name):
    model, batch, config = build(name)
    with torch.no_grad():
        want = model(**batch).logits
        inject(model, config)
        assert torch.equal(model(**batch).logits, want)
        randomise(model)
        assert relative_error(model(**batch).logits, want) > 1e-3
        assert torch.equal(remove(model)(**batch).logits, want)


@every_model
def test_every_adapter_parameter_gets_a_gradient_and_nothing_else(name):
    model, batch = ready(name)
    grads = gradients(model, batch)
    assert len(grads) == 3 * len(injected(model))
    empty = [n for n, grad in grads.items() if grad is None or not grad.any()]
    assert not empty
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", GENERATORS)
def test_generation_with_a_cache_equals_generation_without(name):
    model, batch = ready(name)
    batch = {k: v for k, v in batch.items() if not k.startswith("decoder")}
    texts = [
        model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(*texts)
    base = remove(model).generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert not torch.equal(texts[0], base)  # the experts affect the output


def test_generation_with_a_task_for_each_sample():
    model, batch = ready("llama")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    set_routing(model, task_ids=torch.tensor([0, 3]))
    both = model.generate(**batch, **options)
    for row, task in enumerate((0, 3)):
        set_routing(model, task_ids=torch.tensor([task]))
        alone = model.generate(input_ids=batch["input_ids"][row : row + 1], **options)
        assert torch.equal(alone[0], both[row])


@pytest.mark.parametrize(
    "name, dropout", [("llama", 0.0), ("llama", 0.3), ("t5", 0.3), ("gpt2", 0.0), ("llava", 0.0)]
)
def test_gradient_checkpointing_changes_no_gradient(name, dropout):
    model, batch = ready(name, dropout=dropout)
    model.train()
    for module in model.modules():  # the base's own dropout is not tested here
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(5)
    plain = gradients(model, batch)
    enable_checkpointing(model, use_reentrant=False)
    calls = count_forwards(model)
    torch.manual_seed(5)
    saved = gradients(model, batch)
    assert max(calls.values()) == 2  # recomputation happened
    limit = 1e-4 if name == "t5" else 0.0  # T5's own forward takes another path, so bits differ
    for key, grad in plain.items():
        assert relative_error(saved[key], grad) <= limit, key


def enable_checkpointing(model, **options):
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:  # transformers before 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def count_forwards(model):
    calls = dict.fromkeys(injected(model), 0)

    def counter(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name, layer in injected(model).items():
        layer.register_forward_pre_hook(counter(name))
    return calls


def test_reentrant_checkpointing_trains_the_experts():
    model, batch = ready("llama")
    model.train()

    def task_gradients():
        model.zero_grad()
        model(**batch).logits.square().mean().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = task_gradients()
    enable_checkpointing(model, use_reentrant=True)
    model.enable_input_require_grads()
    for one, other in zip(plain, task_gradients(), strict=True):
        assert relative_error(other, one) < 1e-6


@every_model
def test_adapters_travel_to_a_fresh_model(name, tmp_path):
    model, batch = ready(name)
    save_adapter(model, tmp_path)
    fresh, _, _ = build(name)
    load_adapter(fresh, tmp_path)
    other, _, config = build(name)
    inject(other, config)
    with torch.no_grad():
        want = model(**batch).logits
        assert relative_error(other(**batch).logits, want) > 1e-3
        assert torch.equal(fresh(**batch).logits, want)
        assert torch.equal(load_adapter(other, tmp_path)(**batch).logits, want)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_bf16_models(name):
    """Compared layer by layer on actual inputs, since rounding may change later routers' decisions."""
    model, batch, config = build(name)
    inject(model.to(torch.bfloat16), config)
    randomise(model)
    errors = {}

    def compare(path):
        def hook(layer, args, y):
            with torch.no_grad():
                wide = copy.deepcopy(layer).float()
                wide._forward_hooks.clear()
                errors[path] = relative_error(y, wide(args[0].float()))

        return hook

    for path, layer in injected(model).items():
        layer.register_forward_hook(compare(path))
    grads = gradients(model, batch)
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())
    assert len(errors) == len(injected(model)) and max(errors.values()) < 3 * 2**-8


def vision_layers(model):
    return [name for name in injected(model) if "vision_tower" in name]


def test_a_language_pattern_leaves_the_vision_tower_alone():
    model, _ = ready("llava")
    assert len(injected(model)) == 2 * 7 and not vision_layers(model)
    naive, _, _ = build("llava")
    inject(naive, LoraMoeConfig(**EXPERTS, target_modules=ATTENTION))
    assert len(vision_layers(naive)) == 3 * 3  # CLIP's q, k and v have the same names
    excluding, _, _ = build("llava")
    exclude = r".*vision_tower.*"
    inject(
        excluding,
        LoraMoeConfig(**EXPERTS, target_modules=ATTENTION, exclude_modules=exclude),
    )
    assert list(injected(excluding)) == list(injected(model))


def test_t5_reads_the_dtype_of_wo():
    """T5 keeps wo in fp32 in an fp16 model, and casts the activations to wo.weight.dtype."""
    model, batch, config = build("t5")
    model = model.to(torch.bfloat16)
    for block in (*model.encoder.block, *model.decoder.block):
        block.layer[-1].DenseReluDense.wo.float()
    inject(model, config)
    randomise(model)
    wo = model.encoder.block[0].layer[-1].DenseReluDense.wo
    assert wo.weight is wo.base_layer.weight
    assert wo.lora_A.dtype == torch.float32
    seen = []
    wo.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert model(**batch).logits.isfinite().all()
    assert seen == [torch.float32]


def test_tied_embeddings_stay_tied():
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, tie_word_embeddings=True)
    model = inject(
        transformers.LlamaForCausalLM(config),
        LoraMoeConfig(**EXPERTS, target_modules=ATTENTION),
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is nn.Linear and not model.lm_head.weight.requires_grad
