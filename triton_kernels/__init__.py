"""The Triton kernels, forward and backward.

Exported are the operators of lora_moe/ops.py, with their signatures.  They take CUDA tensors, and CPU tensors
if TRITON_INTERPRET=1 is set before Triton is imported, in fp32, fp16 and bf16.

`lora_forward`, `lora_backward` and `banks` pick kernels by plan.  A file named after a kernel holds it and
its launcher.  Shared: `gating` and `numerics` inside kernels; `experts`, `slots`, `operands`, `tiles` and
`launching` around them.
"""

if __name__ == "triton_kernels":
    raise ImportError(
        "import lora_moe.triton_kernels: the name triton_kernels belongs to another project"
    )

from .banks import routed_lora_banks
from .expand import expand
from .lora_backward import grouped_lora_backward, routed_lora_backward
from .lora_forward import grouped_lora, routed_lora
from .router_topk import route_logits, router_topk
from .router_topk_backward import router_topk_backward
from .shrink import shrink
from .wgrad import wgrad

__all__ = [
    "expand",
    "grouped_lora",
    "grouped_lora_backward",
    "route_logits",
    "routed_lora",
    "routed_lora_backward",
    "routed_lora_banks",
    "router_topk",
    "router_topk_backward",
    "shrink",
    "wgrad",
]
