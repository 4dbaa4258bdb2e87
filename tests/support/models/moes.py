"""Tiny models with their own fused experts, and LoRAs on these from PEFT and from us with the same values."""

from __future__ import annotations

import copy

import torch
import transformers as hf
from torch import nn

from lora_moe import LoraMoeConfig, inject, injected

TARGETS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
E, R, ALPHA = 4, 2, 3
_SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_SCALED = {"rope_type": "default", "rope_theta": 10000.0}
_FAMILIES = {
    "Mixtral": {"num_local_experts": E},
    "Qwen3Moe": {"num_experts": E, "moe_intermediate_size": 20, "norm_topk_prob": True},
    "GptOss": {"num_local_experts": E, "rope_parameters": _SCALED},
}
FAMILIES = tuple(_FAMILIES)
TOKENS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))


def base(family="Mixtral", **fields):
    """A base model with weights large enough for the experts to matter, and nonzero biases."""
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**_SIZES | _FAMILIES[family] | fields)
    model = getattr(hf, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def config(**fields):
    return LoraMoeConfig(**{"r": R, "alpha": ALPHA, "target_parameters": TARGETS} | fields)


def ours(family="Mixtral", *, model=None, **fields):
    """The base with nonzero LoRAs on its own experts."""
    model = inject(base(family) if model is None else model, config(**fields))
    g = torch.Generator().manual_seed(1)
    for layer in injected(model).values():
        for A, B in layer.pairs():
            nn.init.normal_(A, std=0.3, generator=g)
            nn.init.normal_(B, std=0.3, generator=g)
    return model


def peft_of(model, *, targets=TARGETS, **fields):
    """PEFT's LoRA on the base of our model, with our values."""
    from peft import LoraConfig, get_peft_model

    lora = {"r": R, "lora_alpha": ALPHA, "target_parameters": list(targets), "target_modules": []}
    theirs = get_peft_model(base_of(model), LoraConfig(**lora | fields))
    with torch.no_grad():
        for path, layer in injected(model).items():
            for name, wrapper in wrappers_of(theirs, path).items():
                A, B = (getattr(layer, f"lora_{letter}_{name}") for letter in "AB")
                wrapper.lora_A["default"].weight.copy_(A)
                wrapper.lora_B["default"].weight.copy_(as_peft_has(B))
    return theirs


def base_of(model):
    """A copy of the model without our LoRAs."""
    from lora_moe import remove

    return remove(copy.deepcopy(model))


def wrappers_of(theirs, path) -> dict:
    """{parameter: PEFT's wrapper of it}"""
    found, module = {}, theirs.base_model.model.get_submodule(path)
    while hasattr(module, "parameter_name"):
        found[module.parameter_name] = module
        module = module.base_layer
    return found


def as_peft_has(B):
    """(E r, D_out) with the expert index slowest -> (D_out, r E) with it fastest, by loops."""
    r = B.shape[0] // E
    out = torch.empty(B.shape[1], B.shape[0], dtype=B.dtype)
    for e in range(E):
        for j in range(r):
            out[:, j * E + e] = B[e * r + j]
    return out


def layer(family="Mixtral", **fields):
    """(experts layer, x, ids, weights), outside of a model."""
    made = next(iter(injected(ours(family, **fields)).values()))
    g = torch.Generator().manual_seed(3)
    x = torch.randn(9, 16, generator=g)
    ids = torch.stack([torch.randperm(E, generator=g)[:2] for _ in range(9)])
    return made, x, ids, torch.rand(9, 2, generator=g)


def literal(layer, x, ids, weights):
    """The class's formula, token by token and slot by slot."""
    base, r, s = layer.base_layer, layer.config.r, layer.config.scales[0]

    def linear(name, e, v):
        W = getattr(base, name)[e]
        A, B = (getattr(layer, f"lora_{letter}_{name}")[e * r : (e + 1) * r] for letter in "AB")
        y = v @ (W if base.is_transposed else W.T) + s * (v @ A.T) @ B
        return y + getattr(base, f"{name}_bias")[e] if base.has_bias else y

    rows = []
    for v, own, w in zip(x, ids.tolist(), weights):
        out = [
            linear("down_proj", e, base._apply_gate(linear("gate_up_proj", e, v)[None])[0])
            for e in own
        ]
        rows.append(sum(w_j * y for w_j, y in zip(w, out)))
    return torch.stack(rows)
