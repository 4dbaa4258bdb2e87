"""Writes every output and gradient of routed_lora for some cases to a safetensors file; run once per backend.

LORA_MOE_BACKEND=cpp python -m tests.support.outputs FILE
"""

import sys

import torch
from safetensors.torch import save_file

from .cases import BY_NAME, leaves, sample
from .functions import PARAMETERS, cotangents, gradients, routed, routing_outputs

NAMES = ("odd", "tiles fit", "one past a tile", "unequal ranks", "shared A", "wide", "dense")


def outputs(case):
    v = leaves(sample(case), *PARAMETERS)
    y, routing = routed(v, case)
    out = routing_outputs(y, routing)
    grads = gradients(list(out.values()), cotangents(out.values()), v, PARAMETERS)
    exact = {"indices": routing.indices, "counts": routing.counts}
    return {**out, **exact, **{f"d{name}": grad for name, grad in grads.items()}}


if __name__ == "__main__":
    tensors = {
        f"{name}/{key}": value.detach().contiguous()
        for name in NAMES
        for key, value in outputs(BY_NAME[name]).items()
    }
    save_file(tensors, sys.argv[1], metadata={"torch": torch.__version__})
