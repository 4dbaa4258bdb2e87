"""The whole black-box suite on a GPU: the operators' CPU arguments are run there and the results copied back.

Without this, LORA_MOE_BACKEND=triton on a machine with a GPU would compare the reference with itself: the
tests create CPU tensors, which no GPU kernel accepts.
"""

from __future__ import annotations

import os

import torch
from torch.utils._pytree import tree_map

GPU_BACKENDS = ("triton", "cuda")


def requested():
    """The backend that this process was asked to test, or "" for whatever serves."""
    return os.environ.get("LORA_MOE_BACKEND", "auto").replace("auto", "")


def serve_cpu_tensors(library, backend, device="cuda", operators=torch.ops.lora_moe):
    """Makes operators on CPU tensors run on `device`, with the kernels of this backend."""
    from lora_moe import backend as backends
    from lora_moe import ops

    for name in ops.SCHEMAS:
        run = there_and_back(name, getattr(operators, name), device)
        library.impl(name, run, "CPU", allow_override=True)
    backends._serving["cpu"] = backend


def there_and_back(name, operator, device):
    from lora_moe import ops

    def run(*args):
        if name == "grouped_lora":  # a GPU masks wrong ids; on CPU tensors every backend raises
            ops.check_ids(args[4], len(args[6]))
        results = operator(*moved(args, device))
        return moved(results, "cpu")

    return run


def moved(values, device):
    return tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, values)


def wrong_backend(serving):
    """Error message if CPU tensors are not served by the requested backend, otherwise ""."""
    if requested() and serving != requested():
        return (
            f"LORA_MOE_BACKEND={requested()}, but {serving} serves: these tests would prove nothing"
        )
    return ""
