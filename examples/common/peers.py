"""Four ways to fine-tune one model: ours, a loop over experts, dense stacked matmuls, PEFT LoRA.

T tokens, E experts, K picked per token, r one expert's rank, R = E r, D_in and D_out of the linear.

The peers are what a skilled user writes in plain PyTorch: experts as separate parameters (each slice
of a single parameter would cost a full-size gradient), in-place sums, the scaling folded into the
gate.  Mixtures start from the same weights {module name: (lora_A (R, D_in), lora_B (R, D_out),
router_weight (E, D_in))} and share the frozen model.
"""

import math
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.peers import hidden, loop_into, route, spread
from examples.common.smollm2 import share
from lora_moe import LoraMoeConfig, LoraMoeLinear, inject

NUM_EXPERTS, RANK, TOP_K, ALPHA = 8, 8, 2, 16
BALANCE = 1.0  # coefficient of the balance loss, a mean over 210 routers; without it two take all
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoopLoraMoe(nn.Module):
    """y = W x + sum over e of  gate_e scaling B_e A_e x,  one expert at a time, as in HF Mixtral."""

    def __init__(self, base, lora_A, lora_B, router_weight):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ParameterList(a.clone() for a in lora_A.split(RANK))  # E of (r, D_in)
        self.lora_B = nn.ParameterList(b.clone() for b in lora_B.split(RANK))  # E of (r, D_out)
        self.router_weight = nn.Parameter(router_weight.clone())
        self.replay = None  # (T, K): these experts instead of the router's choice

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])  # (T, D_in)
        y = self.base_layer(flat)  # (T, D_out)
        self.indices, weights, self.gate = route(
            flat, self.router_weight, TOP_K, ALPHA / RANK, self.replay
        )
        experts = range(NUM_EXPERTS)  # even without tokens, so that every parameter has a gradient
        if not torch.is_grad_enabled():
            experts = self.indices.unique().tolist()
        y = loop_into(y, flat, self.lora_A, self.lora_B, self.indices, weights, experts)
        return y.view(*x.shape[:-1], -1)


class StackedLoraMoe(nn.Module):
    """y = W x + (gate * (x A^T)) B over the rows of all experts at once; most of the gate is zero."""

    def __init__(self, base, lora_A, lora_B, router_weight):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Parameter(lora_A.clone())
        self.lora_B = nn.Parameter(lora_B.clone())
        self.router_weight = nn.Parameter(router_weight.clone())

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])  # (T, D_in)
        self.indices, weights, self.gate = route(flat, self.router_weight, TOP_K, ALPHA / RANK)
        h = hidden(flat, self.lora_A, spread(self.indices, weights, NUM_EXPERTS))  # (T, R)
        return self.base_layer(flat).addmm_(h, self.lora_B).view(*x.shape[:-1], -1)


def balance(model):
    """The balance loss of a peer, as lora_moe.aux_loss for ours: mean over layers of E sum_e f_e P_e."""

    def one(layer):
        share = layer.indices.flatten().bincount(minlength=NUM_EXPERTS) / layer.indices.numel()
        return NUM_EXPERTS * (share * layer.gate.mean(dim=0)).sum()

    return BALANCE * torch.stack([one(layer) for layer in mixtures(model).values()]).mean()


def start_weights(model, seed):
    """{name: (lora_A, lora_B, router_weight)}: uniform as in LoRA, zeros, and small normal values.

    Each has the dtype of the module's weight.
    """
    generator = torch.Generator().manual_seed(seed)

    def one(base):
        bound = 1 / math.sqrt(base.in_features)
        a = torch.empty(NUM_EXPERTS * RANK, base.in_features).uniform_(
            -bound, bound, generator=generator
        )
        w = torch.empty(NUM_EXPERTS, base.in_features).normal_(0, 0.02, generator=generator)
        b = torch.zeros(NUM_EXPERTS * RANK, base.out_features)
        return tuple(tensor.to(base.weight.dtype) for tensor in (a, b, w))

    return {name: one(base) for name, base in targets(model)}


def targets(model):
    """[(name, linear)] for the seven linears of every layer."""
    return [(n, m) for n, m in model.named_modules() if n.split(".")[-1] in TARGETS]


def ours(model, start):
    config = LoraMoeConfig(
        num_experts=NUM_EXPERTS,
        r=RANK,
        top_k=TOP_K,
        alpha=ALPHA,
        adapter_dtype="base",  # as in the peers
        target_modules=TARGETS,
        balance_coef=BALANCE,
        z_coef=0.0,
    )
    model = inject(share(model), config)
    set_weights(model, start)
    return model


def loop(model, start):
    return _replace(share(model), LoopLoraMoe, start)


def stacked(model, start):
    return _replace(share(model), StackedLoraMoe, start)


def peft_lora(model, seed):
    """One LoRA of rank K r, with as many active parameters as our K picked experts, and no router.

    It has the model's dtype, as the others do; PEFT's default, fp32, would cast each activation twice.
    """
    torch.manual_seed(seed)
    model = share(model)
    rank = TOP_K * RANK
    config = LoraConfig(r=rank, lora_alpha=rank * ALPHA // RANK, target_modules=list(TARGETS))
    with warnings.catch_warnings(
        action="ignore"
    ):  # PEFT 0.21 calls what transformers 5.23 deprecates
        get_peft_model(model, config, autocast_adapter_dtype=False)
    return model  # modified in place, still a plain causal model


def _replace(model, kind, start):
    for name, base in targets(model):
        parent, child = name.rsplit(".", 1)
        setattr(model.get_submodule(parent), child, kind(base, *start[name]))
    return model


def mixtures(model):
    """{name: layer} for every mixture layer, ours or a peer's."""
    kinds = (LoraMoeLinear, LoopLoraMoe, StackedLoraMoe)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def weights(model):
    """{name: (lora_A, lora_B, router_weight)} as copies."""
    return {n: tuple(_flat(p).detach().clone() for p in _of(m)) for n, m in mixtures(model).items()}


def gradients(model):
    """{name: (d lora_A, d lora_B, d router_weight)}."""
    return {n: tuple(_flat(p, "grad") for p in _of(m)) for n, m in mixtures(model).items()}


def set_weights(model, values):
    with torch.no_grad():
        for name, layer in mixtures(model).items():
            for parameter, value in zip(_of(layer), values[name]):
                parts = parameter if isinstance(parameter, nn.ParameterList) else [parameter]
                for part, rows in zip(parts, value.split(len(parts[0]))):
                    part.copy_(rows)


def decisions(model):
    """{name: expert ids (T, K)} of the last forward."""
    return {n: getattr(m, "routing", m).indices for n, m in mixtures(model).items()}


def replay(model, ids):
    """Makes a loop use these expert ids; None restores the router's choice."""
    for name, layer in mixtures(model).items():
        layer.replay = None if ids is None else ids[name].long()


def _of(layer):
    return layer.lora_A, layer.lora_B, layer.router_weight


def _flat(parameter, field="data"):
    parts = parameter if isinstance(parameter, nn.ParameterList) else [parameter]
    return torch.cat([getattr(part, field) for part in parts])
