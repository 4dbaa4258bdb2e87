"""A tiny Llama with experts of order one in all of its linears, always the same."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from lora_moe import LoraMoeConfig, inject, injected

TOKENS = torch.randint(3, 38, (2, 6), generator=torch.Generator().manual_seed(0))
CONFIG = LoraMoeConfig(num_experts=4, r=2, target_modules="all-linear")


def llama(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 40, "intermediate_size": 24, "eos_token_id": None}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | fields)).to(dtype)


def with_experts(model=None, config=CONFIG, seed=1):
    """The model with experts whose B and routers have random values."""
    model = inject(llama() if model is None else model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in injected(model).values():
            for name, tensor in layer.adapter_state().items():
                values = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(values * (0.3 if name == "lora_A" else 1.0))
    return model


def first_layer(model):
    return next(iter(injected(model).values()))


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def zero_gradients(model: nn.Module):
    model.zero_grad(set_to_none=True)
