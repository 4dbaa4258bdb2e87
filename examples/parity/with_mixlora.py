"""The MixLoRA authors' package: experts around each FFN of a tiny Llama, plain LoRAs in its attention."""

from __future__ import annotations

import torch
from mixlora.config import MixLoraConfig
from mixlora.model import inject_adapter_in_model

from lora_moe import inject, injected, presets

from .measure import Pair, Side, causal, embedded, fill, gradients_of, llama

E, R, FFN, ATTENTION = 4, 3, ("gate_proj", "up_proj", "down_proj"), ("q_proj", "o_proj")


def mixlora() -> Pair:
    targets = (*FFN, *ATTENTION)
    ours = inject(llama(), presets.mixlora(E, R, 6, top_k=2, target_modules=targets)).eval()
    for path, layer in injected(ours).items():
        if "self_attn" in path:
            layer.router_weight.requires_grad_(False)  # one expert: its weight is 1
    fill(ours)
    theirs = llama()
    config = MixLoraConfig.from_config(
        {
            "base_model_name_or_path": "tiny", "task_type": "CAUSAL_LM", "peft_type": "MIXLORA",
            "r": R, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": list(targets),
            "num_experts": E, "top_k": 2, "routing_strategy": "mixlora", "act_fn": "silu",
        }
    )  # fmt: skip
    config.adapter_name_, config.dtype_ = "default", torch.float64
    inject_adapter_in_model(theirs, config, weights_of(ours))
    for layer in theirs.model.layers:
        moe = layer.mlp.mixlora_moes["default"]
        moe.gate_.requires_grad_()
        for expert in (*moe.experts_.values(), *layer.self_attn.children()):
            expert.eval()  # experts are not submodules: model.eval() leaves their dropout on
    ids, x = embedded(ours)
    return Pair(
        Side(causal(ours, ids), gradients_of(ours)),
        Side(causal(theirs, ids), lambda: gradients(ours, theirs)),
        x,
    )


def weights_of(model) -> dict:
    """Our tensors under the names in MixLoRA's checkpoints, with B as (D_out, r)."""
    found = {}
    for path, layer in injected(model).items():
        name = path.replace("model.", "mixlora.", 1)
        state = {key: tensor.detach().clone() for key, tensor in layer.adapter_state().items()}
        if "self_attn" in path:
            found[f"{name}.lora_A.weight"] = state["lora_A"]
            found[f"{name}.lora_B.weight"] = state["lora_B"].T
            continue
        found[f"{name}.moe_gate.weight"] = state["router_weight"]
        for proj in FFN:
            pairs = zip(state[f"lora_A_{proj}"].split(R), state[f"lora_B_{proj}"].split(R))
            for e, (A, B) in enumerate(pairs):
                found[f"{name}.{proj}.experts.{e}.lora_A.weight"] = A
                found[f"{name}.{proj}.experts.{e}.lora_B.weight"] = B.T
    return found


def gradients(ours, theirs) -> dict:
    found = {}
    for path in injected(ours):
        module = theirs.get_submodule(path)
        if "self_attn" in path:
            found[f"{path}.lora_A"] = module.lora_A.weight.grad
            found[f"{path}.lora_B"] = module.lora_B.weight.grad.T
            continue
        moe = module.mixlora_moes["default"]
        found[f"{path}.router_weight"] = moe.gate_.grad
        for proj in FFN:
            experts = [moe.experts_[f"experts.{e}.{proj}"] for e in range(E)]
            A, B = ([getattr(x, f"lora_{n}").weight.grad for x in experts] for n in "AB")
            found |= {
                f"{path}.lora_A_{proj}": torch.cat(A),
                f"{path}.lora_B_{proj}": torch.cat(B, 1).T,
            }
    return found
