"""Fused experts that cannot take LoRA, and configurations that are not allowed with them."""

import accelerate
import pytest
import torch
from torch import nn

from lora_moe import (
    LoraMoeExperts,
    inject,
    injected,
    merge,
)
from lora_moe.vllm.rules import refusal

from ..support.models import moes

REFUSED = {
    "number": (
        {"num_experts": 3},
        "num_experts: expected 4, the number of the model's own experts",
    ),
    "nothing": ({"target_parameters": ("nowhere",)}, "nothing matches.*mlp.experts.gate_up_proj"),
    "router": (
        {"target_parameters": ("mlp.gate.weight",)},
        "weight of a MixtralTopKRouter is a single matrix",
    ),
    "linear": ({"target_parameters": ("q_proj.weight",)}, "name linear modules in target_modules"),
}


@pytest.mark.parametrize("fields, message", REFUSED.values(), ids=REFUSED)
def test_inject_refuses(fields, message):
    model = moes.base()
    with pytest.raises(ValueError, match=message):
        inject(model, moes.config(**fields))
    assert not injected(model) and all(p.requires_grad for p in model.parameters())


CONFIGURATIONS = {
    "top_k": ({"top_k": 2}, "top_k: expected None with target_parameters"),
    "gate": ({"gate": "sigmoid"}, "gate: expected 'softmax' with target_parameters"),
    "shared": ({"shared_a": True}, "shared_a: expected False with"),
    "balance": (
        {"balance_coef": 0.5},
        "balance_coef: expected 0 with target_parameters, as the model has",
    ),
    "placement": ({"placement": "ffn"}, "placement: expected 'linear' with target_parameters"),
    "modules": ({"target_modules": ("q_proj",)}, "pass a list of two configurations to inject"),
    "ranks": ({"r": (1, 2, 3, 4)}, "num_experts: expected the model's number of experts"),
}


@pytest.mark.parametrize("fields, message", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_configuration_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        moes.config(**fields)


def test_a_name_that_matches_nothing_is_told():
    with pytest.warns(UserWarning, match=r"no parameter matches 'experts\.up_proj'") as told:
        inject(moes.base(), moes.config(target_parameters=("experts.down_proj", "experts.up_proj")))
    assert told[0].filename == __file__


def test_what_cannot_take_experts_is_refused():
    def refused(prepare, match):
        model = moes.base()
        prepare(model.model.layers[0].mlp.experts)
        with pytest.raises(ValueError, match=match):
            inject(model, moes.config())

    def quantize(experts):
        data = experts.down_proj.detach().to(torch.float8_e4m3fn)
        experts.down_proj = nn.Parameter(data, requires_grad=False)

    refused(quantize, r"quantized \(torch.float8_e4m3fn\); load the model in bfloat16")
    refused(lambda e: setattr(e, "_is_expert_parallel", True), "expert parallelism")
    model = moes.base()
    model.config._experts_implementation = "someones_own"
    with pytest.raises(ValueError, match="experts_implementation='someones_own' is not supported"):
        inject(model, moes.config())
    twice = moes.ours()
    with pytest.raises(ValueError, match="already has experts"):
        inject(twice, moes.config())
    with pytest.raises(ValueError, match="the model's own experts; save with to_peft"):
        merge(twice, [1.0] * moes.E)
    offloaded = moes.base()
    accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="accelerate offloads its weights"):
        inject(offloaded, moes.config())
    with pytest.raises(ValueError, match=r"expected some of \('gate_up_proj', 'down_proj'\)"):
        LoraMoeExperts(
            moes.base().model.layers[0].mlp.experts, moes.config(target_parameters=("w",))
        )
    assert "only linear layers are supported" in refusal(moes.config(num_experts=4))
    with pytest.raises(TypeError, match="expected fused experts, but"):
        LoraMoeExperts(nn.Linear(3, 3), moes.config())
