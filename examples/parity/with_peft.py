"""PEFT: LoRA, several LoRAs in one batch, X-LoRA, Poly, and LoRA on a MoE model's own experts."""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path

import peft
import torch
import transformers

from lora_moe import LoraMoeConfig, from_peft, inject, injected, presets, use_routing

from .measure import Pair, Side, causal, embedded, fill, gradients_of, llama

TARGETS = ["q_proj", "down_proj"]


def lora() -> Pair:
    """A single expert, which needs no routing, is a LoRA."""
    return one_expert(llama, ["q_proj", "up_proj", "down_proj"])


def lora_of_t5() -> Pair:
    """LoRA on T5 in fp32, since T5's attention rounds to it anyway."""

    def base():
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
        config = transformers.T5Config(**sizes, num_layers=2, decoder_start_token_id=0)
        return fill(transformers.T5ForConditionalGeneration(config).eval(), std=0.3)

    return one_expert(base, ["q", "v", "wi", "wo"])


def one_expert(base, targets) -> Pair:
    sizes = {"num_experts": 1, "top_k": 1, "r": 3, "alpha": 7, "target_modules": targets}
    ours = without_routers(inject(base(), LoraMoeConfig(**sizes)))
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets)
    theirs = fill(wrapped(base(), config))
    with torch.no_grad():
        for name, tensor in stacked(ours, theirs, ["default"]).items():
            ours.get_parameter(name).copy_(tensor)
    ids, x = embedded(ours)
    gradients = partial(stacked, ours, theirs, ["default"], of=lambda p: p.grad)
    models = ours, theirs
    if ours.config.is_encoder_decoder:
        models = (partial(model, decoder_input_ids=ids) for model in models)
    loss, their_loss = (causal(model, ids) for model in models)
    return Pair(Side(loss, gradients_of(ours)), Side(their_loss, gradients), x)


def mixed_batch() -> Pair:
    """One LoRA per sample of a batch, chosen by adapter_names in PEFT and by task_ids in ours."""
    ranks, alphas, names = (2, 3), (8, 5), ["first", "second"]
    configs = [
        peft.LoraConfig(r=r, lora_alpha=a, target_modules=TARGETS) for r, a in zip(ranks, alphas)
    ]
    theirs = wrapped(llama(), configs[0], "first")
    theirs.add_adapter("second", configs[1])
    theirs.base_model.set_adapter(names)
    fill(theirs)
    states = [peft.get_peft_model_state_dict(theirs, adapter_name=name) for name in names]
    ours = without_routers(from_peft(llama(), list(zip(states, configs)), top_k=1))
    ids, x = embedded(ours)

    def routed(x):
        with use_routing(ours, task_ids=torch.tensor([1, 0])):
            return causal(ours, ids)(x)

    gradients = partial(stacked, ours, theirs, names, of=lambda p: p.grad)
    named = partial(theirs, adapter_names=names[::-1])
    return Pair(Side(routed, gradients_of(ours)), Side(causal(named, ids), gradients), x)


def xlora() -> Pair:
    """Three frozen LoRAs, mixed per token and layer with weights from a first pass through the base."""
    names = ["0", "1", "2"]  # as PEFT calls them inside
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: str(Path(folder, name)) for name in names}
        for i, name in enumerate(names):
            config = peft.LoraConfig(r=1 + i, lora_alpha=4, target_modules=TARGETS)
            fill(wrapped(llama(), config), seed=i).save_pretrained(folders[name])
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=16, adapters=folders, xlora_depth=1,
            layerwise_scalings=True, softmax_temperature=0.6,
        )  # fmt: skip
        base = llama()
        base.config.use_cache = False  # required by PEFT
        theirs = fill(wrapped(base, config), std=2.0)
        ours = presets.xlora(16, adapters=folders.values(), temperature=0.6)
        ours = inject(llama(), ours).eval()
    presets.two_passes(ours)
    classifier = theirs.base_model.internal_xlora_classifier.layers[-1]
    layers = injected(ours)

    def by_layer(weight, bias):
        parts = zip(layers, weight.unflatten(0, (len(layers), -1)), bias.view(len(layers), -1))
        return {
            f"{path}.router_{n}": t for path, w, b in parts for n, t in (("weight", w), ("bias", b))
        }

    with torch.no_grad():
        for path, tensor in by_layer(classifier.weight, classifier.bias).items():
            ours.get_parameter(path).copy_(tensor)
    ids, x = embedded(ours)
    return Pair(
        Side(causal(ours, ids), gradients_of(ours)),
        Side(
            causal(theirs, ids),
            lambda: by_layer(classifier.weight.grad, classifier.bias.grad),
        ),
        x,
    )


def poly() -> Pair:
    """Skills that each sample's task mixes into one LoRA; in evaluation mode, without noise."""
    E, r = 3, 2
    config = peft.PolyConfig(r=r, n_tasks=4, n_skills=E, target_modules=TARGETS)
    theirs = fill(wrapped(llama(), config), std=1.0)
    ours = inject(llama(), presets.poly(4, E, r, target_modules=TARGETS))
    tasks = torch.tensor([3, 1])

    def arranged(of):
        found = {}
        for path in injected(ours):
            module = theirs.base_model.model.get_submodule(path)
            A, B = (of(t["default"])[0] for t in (module.poly_lora_A, module.poly_lora_B))
            found[f"{path}.lora_A"], found[f"{path}.lora_B"] = A.mT.flatten(0, 1), B.flatten(0, 1)
            found[f"{path}.router_table"] = of(module.poly_router["default"].module_logits)
        return found

    with torch.no_grad():
        for name, tensor in arranged(lambda p: p).items():
            ours.get_parameter(name).copy_(tensor)
    ids, x = embedded(ours)

    def routed(x):
        with use_routing(ours, task_ids=tasks):
            return causal(ours, ids)(x)

    gradients = partial(arranged, lambda p: p.grad)
    named = partial(theirs.base_model, task_ids=tasks)  # PeftModel itself drops them
    return Pair(Side(routed, gradients_of(ours)), Side(causal(named, ids), gradients), x)


def mixtral() -> Pair:
    return own_experts("Mixtral")


def qwen3_moe() -> Pair:
    return own_experts("Qwen3Moe")


def own_experts(family: str) -> Pair:
    """LoRA on the fused experts of a tiny MoE model with its own router, through target_parameters.

    In fp32, as torch's grouped products do not support fp64.
    """
    targets, E, r = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), 4, 2

    def base():
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 20, "pad_token_id": None,
        }  # fmt: skip
        sizes["num_local_experts" if family == "Mixtral" else "num_experts"] = E
        config = getattr(transformers, f"{family}Config")(**sizes)
        return fill(getattr(transformers, f"{family}ForCausalLM")(config).eval(), std=0.3)

    ours = fill(inject(base(), LoraMoeConfig(r=r, alpha=3, target_parameters=targets)))
    config = {"target_parameters": list(targets), "target_modules": []}
    theirs = wrapped(base(), peft.LoraConfig(r=r, lora_alpha=3, **config))

    def parameters():
        for path in injected(ours):
            module = theirs.base_model.model.get_submodule(path)
            while hasattr(module, "parameter_name"):
                for letter, lora in (("A", module.lora_A), ("B", module.lora_B)):
                    yield f"{path}.lora_{letter}_{module.parameter_name}", lora["default"].weight
                module = module.base_layer

    def arranged(name, t):
        """PEFT's B (D_out, r E), with the expert index fastest, as our (E r, D_out); A is unchanged."""
        return t.view(len(t), r, E).permute(2, 1, 0).flatten(0, 1) if ".lora_B_" in name else t

    fill(theirs)
    with torch.no_grad():
        for name, parameter in parameters():
            ours.get_parameter(name).copy_(arranged(name, parameter))
    ids, x = embedded(ours)
    gradients = Side(causal(theirs, ids), lambda: {n: arranged(n, p.grad) for n, p in parameters()})
    return Pair(Side(causal(ours, ids), gradients_of(ours)), gradients, x)


def without_routers(model):
    """Freezes the routers, which are not used."""
    for layer in injected(model).values():
        layer.router_weight.requires_grad_(False)
    return model


def wrapped(base, config, name="default"):
    with warnings.catch_warnings(action="ignore"):  # PEFT uses deprecated functions of transformers
        return peft.get_peft_model(base, config, adapter_name=name).eval()


def stacked(ours, theirs, names, of=lambda p: p) -> dict:
    """Their parameters in our layout: the rows of all experts, concatenated."""
    found = {}
    for path in injected(ours):
        module = theirs.base_model.model.get_submodule(path)
        A, B = ([of(lora[n].weight) for n in names] for lora in (module.lora_A, module.lora_B))
        found |= {f"{path}.lora_A": torch.cat(A), f"{path}.lora_B": torch.cat(B, 1).T}
    return found
