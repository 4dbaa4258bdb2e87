"""A tiny Llama with mixtures as PEFT adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import transformers as hf
from peft import get_peft_model

from lora_moe.peft import MoeLoraConfig

IDS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
TARGETS = ["q_proj", "up_proj"]


def llama(kind=hf.LlamaForCausalLM, **fields):
    """A tiny Llama with the same large random weights at each call."""
    torch.manual_seed(1)
    model = kind(hf.LlamaConfig(**SIZES | fields))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def config(**fields):
    defaults = {"num_experts": 4, "r": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return MoeLoraConfig(**defaults | fields)


def drawn(model, seed=2):
    """Fills all trainable parameters, the experts of the active adapter, with nonzero values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(seed=2, **fields):
    return drawn(get_peft_model(llama(), config(**fields)), seed)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))
