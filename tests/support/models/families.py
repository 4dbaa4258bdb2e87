"""Tiny models of commonly fine-tuned families, with random weights, without downloads.

Each factory returns a model and a batch of two rows for it.  Weights have a large spread, so that the
greedy choice of a token is clear and the experts matter for it.
"""

from __future__ import annotations

import torch
import transformers as hf

VOCABULARY, IMAGE_TOKEN = 40, 39
TOKENS = torch.randint(3, 38, (2, 6), generator=torch.Generator().manual_seed(0))
# a decoder with grouped keys; eos is None so that every generation has its full length
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def draw(*shape):
    """Input features or pixels."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def causal(name, **fields):
    config = getattr(hf, f"{name}Config")(**fields)
    return getattr(hf, f"{name}ForCausalLM")(config), {"input_ids": TOKENS}


def decoder(name, **fields):
    return lambda: causal(name, **DECODER | fields)


def masked(name, **fields):
    def make():
        config = getattr(hf, f"{name}Config")(**ENCODER | fields)
        return getattr(hf, f"{name}ForMaskedLM")(config), {"input_ids": TOKENS}

    return make


def gemma3():
    config = hf.Gemma3TextConfig(**DECODER | {"sliding_window": 4})
    return hf.Gemma3ForCausalLM(config), {"input_ids": TOKENS}


def gpt2():
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_head=2, n_layer=2, n_positions=64, **IDS
    )
    return hf.GPT2LMHeadModel(config), {"input_ids": TOKENS}


def gptj():
    return causal(
        "GPTJ", vocab_size=VOCABULARY, n_embd=16, n_head=2, n_layer=2, n_positions=64, rotary_dim=4,
        **IDS,
    )  # fmt: skip


def opt():
    return causal(
        "OPT", vocab_size=VOCABULARY, hidden_size=16, ffn_dim=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=12, dropout=0.0,
        **IDS,
    )  # fmt: skip


def bloom():
    return causal("Bloom", vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2, **IDS)


def falcon():
    return causal(
        "Falcon", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ffn_hidden_size=24, **IDS,
    )  # fmt: skip


def t5():
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", decoder_start_token_id=0, **IDS,
    )  # fmt: skip
    batch = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]}
    return hf.T5ForConditionalGeneration(config), batch


def bart():
    config = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=64, dropout=0.0, decoder_start_token_id=2,
        forced_eos_token_id=None, **IDS,
    )  # fmt: skip
    batch = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]}
    return hf.BartForConditionalGeneration(config), batch


def whisper():
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, num_mel_bins=8,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_source_positions=10, max_target_positions=32,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, **IDS,
    )  # fmt: skip
    batch = {"input_features": draw(2, 8, 20), "decoder_input_ids": TOKENS[:, :4]}
    return hf.WhisperForConditionalGeneration(config), batch


def wavlm():
    config = hf.WavLMConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, conv_dim=(8, 8), conv_kernel=(4, 3), conv_stride=(4, 2),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_buckets=8,
        layerdrop=0.0, apply_spec_augment=False, hidden_dropout=0.0, attention_dropout=0.0,
        feat_proj_dropout=0.0, final_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    return hf.WavLMForCTC(config), {"input_values": draw(2, 200)}


def vit():
    config = hf.ViTConfig(**VISION, num_labels=3)
    return hf.ViTForImageClassification(config), {"pixel_values": draw(2, 3, 8, 8)}


def clip():
    text = {k: v for k, v in DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
    text["eos_token_id"] = 2  # the text's embedding is taken at its end token
    config = hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return hf.CLIPModel(config), {"input_ids": TOKENS, "pixel_values": draw(2, 3, 8, 8)}


def llava():
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**DECODER),
        image_token_id=IMAGE_TOKEN, image_seq_length=4, vision_feature_layer=-1, **IDS,
    )  # fmt: skip
    tokens = torch.cat([torch.full((2, 4), IMAGE_TOKEN), TOKENS], 1)
    model = hf.LlavaForConditionalGeneration(config)
    return model, {"input_ids": tokens, "pixel_values": draw(2, 3, 8, 8)}


def qwen2_vl():
    text = DECODER | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = hf.Qwen2VLConfig(
        text_config=text,
        vision_config={
            "depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "mlp_ratio": 2,
        },
        image_token_id=IMAGE_TOKEN, video_token_id=38, vision_start_token_id=2,
        vision_end_token_id=1, **IDS,
    )  # fmt: skip
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])  # 16 patches per image, merged by 4
    image = torch.cat([torch.full((2, 1), 2), torch.full((2, 4), IMAGE_TOKEN)], 1)
    tokens = torch.cat([image, TOKENS], 1)
    batch = {
        "input_ids": tokens, "mm_token_type_ids": (tokens == IMAGE_TOKEN).int(),
        "pixel_values": draw(32, 3 * 2 * 4 * 4), "image_grid_thw": grid,
    }  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration(config), batch


def mamba():
    return causal(
        "Mamba", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, **IDS
    )


def mamba2():
    return causal(
        "Mamba2", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4,
        num_heads=4, head_dim=8, n_groups=1, chunk_size=4, **IDS,
    )  # fmt: skip


def deepseek_v3():
    fields = {
        "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 8, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1, "head_dim": 4,
    }  # fmt: skip
    return causal("DeepseekV3", **DECODER | fields)


SPARSE = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": decoder("Llama"),
    "qwen2": decoder("Qwen2"),
    "qwen3": decoder("Qwen3"),
    "gemma": decoder("Gemma"),
    "gemma2": decoder("Gemma2", sliding_window=4),
    "gemma3": gemma3,
    "mistral": decoder("Mistral", sliding_window=4),
    "phi": decoder("Phi", num_key_value_heads=2),
    "phi3": decoder("Phi3"),
    "gpt2": gpt2,
    "gpt-neox": decoder("GPTNeoX"),
    "gpt-j": gptj,
    "opt": opt,
    "bloom": bloom,
    "falcon": falcon,
    "t5": t5,
    "bart": bart,
    "bert": masked("Bert"),
    "roberta": masked("Roberta"),
    "modernbert": masked("ModernBert"),
    "deberta-v2": masked("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "vit": vit,
    "clip": clip,
    "whisper": whisper,
    "llava": llava,
    "qwen2-vl": qwen2_vl,
    "mixtral": decoder("Mixtral", **SPARSE),
    "qwen3-moe": decoder("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    "deepseek-v3": deepseek_v3,
    "gpt-oss": decoder("GptOss", **SPARSE, sliding_window=4),
    "mamba2": mamba2,
    "mamba": mamba,
    "wavlm": wavlm,
}
