"""MoE-PEFT, by MixLoRA's authors: LoRAMoE, MoLA and the three routers of MixLoRA, with their losses.

Its experts and routers are fp32.  It requires a dropout rate; dropout is disabled here.
"""

from __future__ import annotations

import torch
from moe_peft.adapters import lora_config_factory, moe_layer_factory, router_loss_factory
from moe_peft.common import Linear, LLMModelConfig, LLMModelInput
from moe_peft.models.modeling_llama import LlamaMLP
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP as Ffn

from lora_moe import aux_loss, inject, presets

from .measure import Pair, Side, fill, gradients_of, tokens

E, R, D, FFN = 4, 3, 12, ("gate_proj", "up_proj", "down_proj")
TO_FFN = {"gate_proj": "w1_", "down_proj": "w2_", "up_proj": "w3_"}


def loramoe() -> Pair:
    return linear(presets.loramoe(E, R, 6, target_modules=("0",)), "loramoe")


def mola() -> Pair:
    """MoLA; its balance loss is K times ours, which is 1 for an even load."""
    config = presets.mola(E, R, 2, 6, target_modules=("0",), balance_coef=2 * 0.5)
    return linear(config, "mola", top_k=2, router_loss=True, router_aux_loss_coef=0.5)


def linear(config, strategy, **fields) -> Pair:
    torch.manual_seed(0)
    base = nn.Linear(D, 10)
    ours = fill(inject(nn.Sequential(base), config)).train()
    made = configured(strategy, ["q_proj"], **fields)
    wrapped = Linear(base, "cpu")
    put(wrapped, made, ours[0].lora_A, ours[0].lora_B)
    moe = moe_layer_factory(D, torch.device("cpu"), made, ours[0].router_weight)

    def theirs(x):
        return moe.forward(
            residual=base(x), hidden_states=x, lora_linear=wrapped
        ), moe.router_logits_

    def gradients():
        A, B = taken(wrapped, made)
        return {"0.lora_A": A, "0.lora_B": B, "0.router_weight": moe.gate_.weight.grad}

    return pair(
        ours, theirs, gradients, router_loss_factory(made) if "router_loss" in fields else None
    )


def mixlora() -> Pair:
    config = presets.mixlora(E, R, 6, target_modules=FFN, balance_coef=2 * 0.5)
    return ffn(config, "mixlora", top_k=2, router_aux_loss_coef=0.5)


def mixlora_dynamic() -> Pair:
    """MixLoRA with top-p, without its balance loss, which is defined differently."""
    config = presets.mixlora(E, R, 6, top_p=0.6, target_modules=FFN, balance_coef=0.0)
    return ffn(config, "mixlora-dynamic", top_p=0.6, router_loss=False)


def mixlora_switch() -> Pair:
    """MixLoRA-Switch in training mode, with enough capacity for all tokens, since ours drops none."""
    config = presets.mixlora(E, R, 6, switch=True, target_modules=FFN, balance_coef=0.5, z_coef=0.2)
    return ffn(
        config, "mixlora-switch", router_aux_loss_coef=0.5, router_z_loss_coef=0.2,
        jitter_noise=0.0,
    )  # fmt: skip


def ffn(config, strategy, **fields) -> Pair:
    torch.manual_seed(0)
    base = Ffn(LlamaConfig(hidden_size=D, intermediate_size=16, num_attention_heads=2))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.2)
    made = configured(strategy, list(FFN), act_fn="silu", **fields)
    wrapped = LlamaMLP(
        base.gate_proj,
        base.down_proj,
        base.up_proj,
        LLMModelConfig(device_="cpu", hidden_act_="silu"),
    )
    ours = fill(inject(nn.Sequential(base), config), std=0.3).train()
    (layer,) = ours
    parts = {proj: getattr(wrapped, TO_FFN[proj]) for proj in FFN}
    for proj, part in parts.items():
        put(part, made, getattr(layer, f"lora_A_{proj}"), getattr(layer, f"lora_B_{proj}"))
    moe = moe_layer_factory(D, torch.device("cpu"), made, layer.router_weight)
    given = LLMModelInput(efficient_operator_=False)

    def theirs(x):
        return moe.forward(x, wrapped, given)

    def gradients():
        found = {"0.router_weight": moe.gate_.weight.grad}
        for proj, part in parts.items():
            A, B = taken(part, made)
            found |= {f"0.lora_A_{proj}": A, f"0.lora_B_{proj}": B}
        return found

    return pair(ours, theirs, gradients, router_loss_factory(made))


def configured(strategy, targets, **fields):
    sizes = {"r": R, "lora_alpha": 6, "num_experts": E, "lora_dropout": 0.1}
    config = lora_config_factory(
        sizes | {"routing_strategy": strategy, "target_modules": targets} | fields
    )
    config.adapter_name = "own"
    return config


def put(linear, config, lora_A, lora_B):
    for e, (A, B) in enumerate(zip(lora_A.split(R), lora_B.split(R))):
        linear.init_lora_weight(config.expert_config(e), (A.detach(), B.detach().T))
        linear.loras_[f"moe.own.experts.{e}"].eval()


def taken(linear, config):
    """The gradients of A (R, D_in) and B (R, D_out) of all experts."""
    loras = [linear.loras_[f"moe.own.experts.{e}"] for e in range(E)]
    A = [lora.lora_a_.weight.grad for lora in loras]
    return torch.cat(A), torch.cat([lora.lora_b_.weight.grad for lora in loras], 1).T


def pair(ours, theirs, gradients, router_loss) -> Pair:
    def loss(x):
        y = ours(x)
        return y.square().mean() + (aux_loss(ours) if router_loss else 0)

    def their_loss(x):
        y, logits = theirs(x)
        return y.square().mean() + (router_loss(logits, None) if router_loss else 0)

    return Pair(
        Side(loss, gradients_of(ours)), Side(their_loss, gradients), tokens(D, torch.float32)
    )
