"""Tiny models in folders, with the classes and files that the scripts load; no hub is used."""

import torch
import transformers as hf

SPECIAL = ["<pad>", "</s>", "<s>", "<image>"]
CODEC = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
CLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
IDS = {"pad_token_id": 0, "eos_token_id": 1}


def tokenizer(bos):
    """Byte tokens; an end token (T5) or a beginning token (Llama) is added."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL + alphabet)}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    single, token = ("<s> $A", ("<s>", 2)) if bos else ("$A </s>", ("</s>", 1))
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[token])
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **CODEC)


def pixels():
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    return hf.CLIPImageProcessor(**sizes)


def flan_t5(folder):
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=len(SPECIAL) + 256, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, **IDS,
    )  # fmt: skip
    hf.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer(bos=False).save_pretrained(folder)
    return folder


def clip(folder):
    torch.manual_seed(1)
    hf.CLIPVisionModel(hf.CLIPVisionConfig(**CLIP)).save_pretrained(folder)
    pixels().save_pretrained(folder)
    return folder


def llava(folder):
    torch.manual_seed(2)
    text = hf.LlamaConfig(
        vocab_size=len(SPECIAL) + 256, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=2, initializer_range=0.3, **IDS,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP), text_config=text, image_token_id=3,
        image_seq_length=4, vision_feature_layer=-2,
    )  # fmt: skip
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    hf.LlavaProcessor(
        pixels(), tokenizer(bos=True), patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def draw(path, color, size=(12, 8)):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
