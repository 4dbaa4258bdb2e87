"""Requirements on the operands of launchers: dtypes and strides."""

import torch

SUPPORTED = (torch.float32, torch.float16, torch.bfloat16)


def require_supported(*operands, dtype=None):
    for got in (*(v.dtype for v in operands), *([] if dtype is None else [dtype])):
        if got not in SUPPORTED:
            raise TypeError(f"triton kernels: expected float32, float16 or bfloat16, got {got}")


def rows_contiguous(v):
    """v with unit stride along its columns, copied only if needed; None stays None."""
    if v is None or v.stride(-1) == 1 or v.shape[-1] == 1 or v.numel() == 0:
        return v
    return v.contiguous()
