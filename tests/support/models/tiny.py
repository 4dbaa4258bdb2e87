"""A tiny decoder, a tokenizer and texts, created here without downloads."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_moe import LoraMoeConfig, inject, injected

WORDS = [
    "the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "big", "small", "red", "blue", "house",
    "tree", "and", "or", "not", "today",
]  # fmt: skip
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def base(seed=0, **fields):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | fields))


EXPERTS = {
    "num_experts": 4, "r": 2, "top_k": 2, "target_modules": ["q_proj", "down_proj"],
    "balance_coef": 0.01, "z_coef": 0.1,
}  # fmt: skip


def model(seed=0, trained=False, **experts):
    """The decoder with fresh experts (B = 0), or with nonzero ones if `trained`."""
    made = inject(base(seed), LoraMoeConfig(**EXPERTS | experts))
    if trained:
        train_by_hand(made)
    return made


def train_by_hand(made, std=0.3, seed=1):
    g = torch.Generator().manual_seed(seed)
    for layer in injected(made).values():
        nn.init.normal_(layer.lora_B, std=std, generator=g)
        nn.init.normal_(layer.router_weight, std=std, generator=g)


def sequences(count, length=8, seed=2):
    """Examples for Trainer, of equal length."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 32, (count, length), generator=g)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def padded(count, longest=10, seed=2):
    """Examples of unequal length, padded on the right."""
    g = torch.Generator().manual_seed(seed)
    examples = []
    for row in torch.randint(3, 32, (count, longest), generator=g):
        n = int(torch.randint(3, longest + 1, (), generator=g))
        mask = (torch.arange(longest) < n).long()
        labels = torch.where(mask.bool(), row, -100)
        examples.append({"input_ids": row * mask, "attention_mask": mask, "labels": labels})
    return examples


def texts(count=16, seed=3):
    g = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(WORDS), (count, 9), generator=g)
    lengths = torch.randint(3, 10, (count,), generator=g)
    return [" ".join(WORDS[i] for i in row[:n]) for row, n in zip(picks, lengths)]
