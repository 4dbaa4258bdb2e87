"""`python -m examples.demo.reload ADAPTER IDS OUT [LAYERS]`: loads an adapter and writes its logits."""

import sys

import torch
from safetensors.torch import load_file, save_file

import lora_moe
from examples.common.smollm2 import load_model


def logits_of(model, ids):
    """Logits (N, V) after the last token of each row."""
    with torch.no_grad():
        return model(input_ids=ids, logits_to_keep=1).logits[:, -1].contiguous()


def main(adapter, ids_file, out_file, layers=""):
    model = lora_moe.load_adapter(load_model(int(layers) if layers else None), adapter)
    save_file({"logits": logits_of(model, load_file(ids_file)["ids"])}, out_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
