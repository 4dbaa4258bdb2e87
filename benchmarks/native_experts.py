"""LoRA on an MoE model's own fused experts, forward and backward.

    lora-moe bench experts [--tokens 512] [--dtype fp32] [--device cpu] [--fresh] [--json FILE] ...

Mixtral's experts with sizes 1024 and 512, E=32, top-4, r=16 on both weights; all contenders start from
the same values:

    ours          LoraMoeExperts
    PEFT          LoraConfig(target_parameters=...), which computes W + s B A of all experts
    two products  transformers' grouped product, and two more for the LoRA, as a user would write it
    no adapter    the frozen experts; their backward gives the gradients of x and the router's weights alone

A call is the forward, and the backward for x, the router's weights and all adapters.  The outputs agree, or
nothing is timed.  Freed memory is kept for the next call, as inside a model; --fresh uses glibc's defaults.
"""

import copy
import sys

import torch
from torch import nn

from benchmarks import one_layer
from benchmarks.one_layer import PLAIN, Call
from lora_moe import LoraMoeConfig, LoraMoeExperts
from lora_moe.peft_experts import columns_of

D, F, E, R, K, ALPHA = 1024, 512, 32, 16, 4, 32
NAMES = {"gate_up_proj": (D, 2 * F), "down_proj": (F, D)}


def main(argv=None):
    args = one_layer.parse(argv, "experts", __doc__, tokens=512)
    return one_layer.main(
        args, lambda dtype: contenders(args.tokens, dtype, args.device), "experts'"
    )


def contenders(tokens, dtype, device):
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K,
        experts_implementation="grouped_mm",
    )  # fmt: skip
    base = MixtralExperts(config)
    for name, parameter in base.named_parameters():
        nn.init.normal_(parameter, std=NAMES[name][0] ** -0.5)
    base = base.to(device, dtype).requires_grad_(False)
    x = torch.randn(tokens, D).to(device, dtype).requires_grad_()
    weights, ids = torch.softmax(torch.randn(tokens, E), -1).topk(K, -1)
    given = x, ids.to(device), weights.to(device, dtype).requires_grad_()
    pairs = {}
    for name, (D_in, D_out) in NAMES.items():
        A, B = torch.randn(E * R, D_in) * D_in**-0.5, torch.randn(E * R, D_out) * R**-0.5
        pairs[name] = A.to(device, dtype), B.to(device, dtype)
    return {
        "ours": ours(base, given, pairs),
        "PEFT": peft(base, given, pairs),
        "two products": two_products(base, given, pairs),
        PLAIN: Call(base, given, []),
    }


def ours(base, given, pairs):
    targets = tuple(f"experts.{name}" for name in NAMES)
    config = LoraMoeConfig(r=R, alpha=ALPHA, target_parameters=targets, adapter_dtype="base")
    layer = LoraMoeExperts(base, config)
    with torch.no_grad():
        for own, pair in zip(layer.pairs(), pairs.values(), strict=True):
            for parameter, value in zip(own, pair, strict=True):
                parameter.copy_(value)
    return Call(layer, given, list(layer.adapter_state().values()))


def peft(base, given, pairs):
    from peft import LoraConfig, get_peft_model

    holder = nn.Module()
    holder.experts = copy.deepcopy(base)
    targets = [f"experts.{name}" for name in NAMES]
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_parameters=targets, target_modules=[])
    holder = get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model
    layer = wrapper = holder.experts
    while hasattr(wrapper, "parameter_name"):
        A, B = pairs[wrapper.parameter_name]
        wrapper.lora_A["default"].weight.data.copy_(A)
        wrapper.lora_B["default"].weight.data.copy_(columns_of(B, E))
        wrapper = wrapper.base_layer
    return Call(layer, given, [p for p in layer.parameters() if p.requires_grad])


def two_products(base, given, pairs):
    """With slots sorted by expert: y = x W_e + s (x A_e^T) B_e, three grouped products."""
    from transformers.integrations.moe import _grouped_mm as grouped

    pairs = {
        name: (A.view(E, R, -1).clone().requires_grad_(), B.view(E, R, -1).clone().requires_grad_())
        for name, (A, B) in pairs.items()
    }

    def linear(name, x, ends):
        A, B = pairs[name]
        low = grouped(x, A.transpose(1, 2), ends)
        return grouped(x, getattr(base, name).transpose(1, 2), ends) + ALPHA / R * grouped(
            low, B, ends
        )

    def forward(x, ids, weights):
        sorted_ids, order = torch.sort(ids.flatten())
        experts = torch.arange(E, device=ids.device)
        ends = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
        h = linear("gate_up_proj", x[order // K], ends)
        h = linear("down_proj", base._apply_gate(h), ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // K, h)

    return Call(forward, given, [t for pair in pairs.values() for t in pair])


if __name__ == "__main__":
    sys.exit(main())
