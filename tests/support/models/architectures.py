"""One tiny model of each architecture, with experts."""

from __future__ import annotations

import pytest
import torch

from lora_moe import (
    LoraMoeConfig,
)

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
TOKENS = torch.randint(3, 38, (2, 6), generator=torch.Generator().manual_seed(0))
EXPERTS = {"num_experts": 4, "r": 2, "alpha": 4}


def llama():
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, eos_token_id=None)
    return transformers.LlamaForCausalLM(config), {"input_ids": TOKENS}


def bert():
    config = transformers.BertConfig(**SIZES, intermediate_size=24)
    return transformers.BertForMaskedLM(config), {"input_ids": TOKENS}


def t5():
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    batch = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]}
    return transformers.T5ForConditionalGeneration(config), batch


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_head=2, n_layer=2, n_positions=32, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": TOKENS}


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    text = transformers.LlamaConfig(**SIZES, intermediate_size=24, eos_token_id=None)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=39, image_seq_length=4
    )
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([torch.full((2, 4), 39), TOKENS], 1)
    model = transformers.LlavaForConditionalGeneration(config)
    return model, {"input_ids": tokens, "pixel_values": image}


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LANGUAGE_ONLY = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
MODELS = {
    "llama": (llama, ATTENTION),
    "bert": (bert, ("query", "key", "value", "attention.output.dense", "intermediate.dense")),
    "t5": (t5, ("q", "k", "v", "o", "wi_0", "wi_1", "wo")),
    "gpt2": (gpt2, ("c_attn", "c_proj", "c_fc")),
    "llava": (llava, LANGUAGE_ONLY),
}


def build(name, seed=0, **fields):
    """(model in eval mode, batch, matching configuration)."""
    torch.manual_seed(seed)
    make, targets = MODELS[name]
    model, batch = make()
    return model.eval(), batch, LoraMoeConfig(**EXPERTS, target_modules=targets, **fields)
