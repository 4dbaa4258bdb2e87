"""A tiny Llama, its tokenizer, and adapters of every kind that a server supports."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import lora_moe
from lora_moe import LoraMoeConfig
from lora_moe.routers import NoisyRouter, ThresholdRouter

VOCABULARY = 128
SIZES = {"num_experts": 4, "r": 4}
# configuration of layer i; a linear that no pattern matches has no experts
KINDS = (
    LoraMoeConfig(**SIZES, target_modules=r".*\.0\.(self_attn|mlp)\..*_proj"),
    LoraMoeConfig(**SIZES, gate="sigmoid", target_modules=r".*\.1\.(self_attn|mlp)\..*_proj"),
    LoraMoeConfig(
        num_experts=3, r=(1, 6, 2), alpha=(4, 8, 2), use_rslora=True,
        target_modules=r".*\.2\.(self_attn|mlp)\..*_proj",
    ),
    LoraMoeConfig(**SIZES, shared_a=True, target_modules=r".*\.3\.(self_attn|mlp)\..*_proj"),
    LoraMoeConfig(
        **SIZES, selection_bias=True, router_bias=True, target_modules=r".*\.4\..*[qv]_proj"
    ),
    LoraMoeConfig(**SIZES, top_k=3, top_p=0.6, target_modules=r".*\.4\..*(k|up|down|o)_proj"),
    LoraMoeConfig(**SIZES, top_k=3, threshold=0.3, temperature=1.5, target_modules=r".*\.5\..*_proj"),
    LoraMoeConfig(
        **SIZES, router=ThresholdRouter(max_threshold=0.4), target_modules=r".*\.6\..*_proj"
    ),
    LoraMoeConfig(**SIZES, router=NoisyRouter(std=1.0), target_modules=r".*\.7\..*(o|down)_proj"),
    LoraMoeConfig(**SIZES, top_k=4, target_modules=r".*\.7\..*(q|gate)_proj"),
)  # fmt: skip


def save_base(folder, **sizes):
    """Saves a model with heads of 32 columns, as required by vLLM's CPU attention, and two key heads."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.06, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**fields | sizes)).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", eos_token="w1")
    fast.save_pretrained(folder)
    return folder


def load_base(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def save_adapter(base, folder, configs, seed=1, scale=0.1):
    """Saves an adapter that affects the output: B of size `scale`, routers with varied decisions."""
    torch.manual_seed(seed)
    model = lora_moe.inject(load_base(base), configs)
    with torch.no_grad():
        for layer in lora_moe.injected(model).values():
            for name, tensor in layer.adapter_state().items():
                if name != "lora_A":
                    tensor.normal_(std=scale if name == "lora_B" else 0.3)
    lora_moe.save_adapter(model, folder)
    return folder


def prompts(count=16, longest=80, seed=0):
    """Token ids of various lengths; the second half has the prefixes of the first, for prefix caching."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, longest), generator=generator)
    half = count // 2
    ids[half:, : longest // 2] = ids[:half, : longest // 2]
    lengths = torch.linspace(longest, 3, count).round().int().tolist()
    return [row[:n].tolist() for row, n in zip(ids, lengths)]


@torch.no_grad()
def log_probabilities(model, ids):
    """(log-probabilities of the next tokens (len - 1,), gap of each decision (len, layers))."""
    logits = model(torch.tensor([ids])).logits[0].float()
    next_ones = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
    gaps = [gap(layer) for layer in lora_moe.injected(model).values()]
    return next_ones[:, 0], torch.stack(gaps, 1) if gaps else torch.ones(len(ids), 1)


def gap(layer):
    """(T,): gap between each decision of the layer's last forward and the next alternative."""
    config, logits = layer.config, layer.routing.logits
    if isinstance(config.router, ThresholdRouter):  # gates go to zero where an expert leaves
        return torch.ones(len(logits))
    gates = logits.sigmoid() if config.gate == "sigmoid" else logits.softmax(1)
    biased = layer.adapter_state().get("selection_bias")
    scores = logits if biased is None else gates + biased
    best = scores.sort(1, descending=True)
    near = [torch.ones(len(logits), 1)]
    if config.top_k < config.num_experts:
        near.append(
            best.values[:, config.top_k - 1 : config.top_k] - best.values[:, config.top_k :][:, :1]
        )
    if config.threshold is not None:
        near.append((gates - config.threshold).abs())
    if config.top_p is not None:
        near.append((gates.sort(1, descending=True).values.cumsum(1) - config.top_p).abs())
    return torch.cat(near, 1).amin(1)
