"""FFNs of every form with whole FFNs as experts, and their formula."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lora_moe import LoraMoeConfig, backend_info
from lora_moe.mlp import LoraMoeMLP

GPU = backend_info()["serving"]["cpu"] in ("triton", "cuda")  # kernels without fp64
DTYPE = torch.float32 if GPU else torch.float64
D, F, E, R = 6, 10, 4, 3
B, L = 2, 5


class Gated(nn.Module):
    """An FFN as in Llama."""

    def __init__(self, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(D, F, bias) for _ in range(2))
        self.down_proj = nn.Linear(F, D, bias)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    """An FFN as in BERT and GPT, with biases, and with dropout as in T5."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.fc2(self.dropout(self.act(self.fc1(x))))


class Fused(nn.Module):
    """An FFN as in Phi-3, with gate and up in one linear."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(D, 2 * F, False), nn.Linear(F, D, False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * nn.functional.silu(gate))


FFNS = {
    "gated": (Gated, ("gate_proj", "up_proj", "down_proj")),
    "gated, biases": (lambda: Gated(True), ("gate_proj", "up_proj", "down_proj")),
    "down alone": (lambda: Gated(True), ("down_proj",)),
    "gate alone": (lambda: Gated(True), ("gate_proj",)),
    "all but down": (Gated, ("up_proj", "gate_proj")),
    "plain": (Plain, ("fc1", "fc2")),
    "fused": (Fused, ("gate_up_proj", "down_proj")),
}


def layer_of(ffn, seed=0, dtype=DTYPE, **fields):
    torch.manual_seed(seed)
    make, names = FFNS[ffn]
    config = {"num_experts": E, "r": R, "alpha": 4.0, "placement": "ffn", "target_modules": names}
    layer = LoraMoeMLP(make().to(dtype).requires_grad_(False), LoraMoeConfig(**config | fields))
    for tensor in layer.adapter_state().values():
        nn.init.normal_(tensor, std=0.7)
    return layer.to(dtype).eval()


def input_of(dtype=DTYPE, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def expert(layer, p, e):
    """The FFN with expert e merged into its weights; differentiable in p."""
    merged, rows = {}, slice(*layer.offsets[e : e + 2])
    for name, child in layer.base_layer.named_children():
        if isinstance(child, nn.Linear):
            merged[f"{name}.weight"] = child.weight
            if child.bias is not None:
                merged[f"{name}.bias"] = child.bias
        if f"lora_B_{name}" in p:
            A = p[f"lora_A_{name}"] if layer.config.shared_a else p[f"lora_A_{name}"][rows]
            delta = p[f"lora_B_{name}"][rows].T @ A
            merged[f"{name}.weight"] = child.weight + layer.scales[e] * delta
    bare = copy.deepcopy(layer.base_layer)
    for child in bare.children():
        child._forward_hooks.clear()
        child._forward_pre_hooks.clear()
    return lambda x: torch.func.functional_call(bare, merged, (x,))
