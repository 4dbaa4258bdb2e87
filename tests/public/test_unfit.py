"""Why a module cannot take experts: the reason for each kind, and a similar module that can."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_moe import LoraMoeConfig, inject, injected
from lora_moe.targets import why_not

CONFIG = {"num_experts": 4, "r": 2}


def names(*targets):
    return LoraMoeConfig(**CONFIG, target_modules=targets)


class WeightOnly(nn.Module):
    """Only the weight gives the sizes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return x @ self.weight.T


class Pair(nn.Linear):
    """As in Megatron: the caller adds the bias."""

    def forward(self, x):
        return F.linear(x, self.weight), self.bias


class ColumnParallelLinear(nn.Linear):
    pass


KINDS = {
    "linear": (lambda: nn.Linear(4, 4), None),
    "weight-only": (WeightOnly, None),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), None),
    "lazy": (lambda: nn.LazyLinear(4), "has no size yet: run the model once first"),
    "embedding": (lambda: nn.Embedding(4, 4), "an Embedding is not linear"),
    "embedding-bag": (lambda: nn.EmbeddingBag(4, 4), "EmbeddingBag is not linear"),
    "conv": (lambda: nn.Conv1d(4, 4, 1), "Conv1d is not linear"),
    "bilinear": (lambda: nn.Bilinear(4, 4, 4), "Bilinear is not linear"),
    "2d-norm": (lambda: nn.LayerNorm((4, 4)), "LayerNorm is not linear"),
    "container": (lambda: nn.Sequential(nn.Linear(4, 4)), "Sequential is not linear"),
    "pair": (lambda: Pair(4, 4), "a Pair returns a tuple"),
    "column-parallel": (lambda: ColumnParallelLinear(4, 4), "shard with FSDP2 instead"),
}


@pytest.mark.parametrize("make, reason", KINDS.values(), ids=KINDS)
def test_kinds_of_modules(make, reason):
    model = nn.ModuleDict({"target": make()})
    if reason is None:
        assert why_not(model, "target") is None
        assert list(injected(inject(model, names("target")))) == ["target"]
    else:
        with pytest.raises(ValueError, match=rf"target \(.*{reason}.*\)"):
            inject(model, names("target"))


class Router(nn.Module):
    """Picks experts itself, as in transformers' sparse models."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        weights, indices = F.linear(x, self.weight).softmax(-1).topk(2)
        return weights, indices


class Nested(nn.Module):
    """A router that holds a linear, as in Switch and GraniteMoe."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(4, 3)

    def forward(self, x):
        return self.classifier(x).topk(2)


class TopKGating(Nested):
    pass


class DeepRouter(nn.Module):
    """A router that contains a network, as in Zaya."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))

    def forward(self, x):
        return self.inner(x).topk(2)


class Bank(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 4))


class Sparse(nn.Module):
    def __init__(self, gate, experts):
        super().__init__()
        self.gate, self.experts, self.proj = gate, experts, nn.Linear(4, 4)
        self.shared_expert_gate = nn.Linear(4, 1)


def listed():
    return nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])


ROUTERS = {
    "tuple": (Router, Bank, "gate"),
    "linear": (lambda: nn.Linear(4, 3), listed, "gate"),
    "linear-beside-a-bank": (lambda: nn.Linear(4, 3), Bank, "gate"),
    "nested": (TopKGating, listed, "gate.classifier"),
    "deep": (DeepRouter, Bank, "gate.inner.0"),
}


@pytest.mark.parametrize("gate, experts, path", ROUTERS.values(), ids=ROUTERS)
def test_routers_of_the_models_own_experts(gate, experts, path):
    model = nn.ModuleDict({"mlp": Sparse(gate(), experts())})
    with pytest.raises(ValueError, match=rf"mlp\.{path} \(it routes to the model's own experts\)"):
        inject(model, names(path))
    with pytest.raises(ValueError, match="linear modules here") as error:
        inject(model, names("q_proj"))
    assert "mlp.proj" in str(error.value) and path not in str(error.value).replace(
        "expert_gate", ""
    )
    inject(model, LoraMoeConfig(**CONFIG, target_modules="all-linear"))
    linear = ["mlp.experts.0", "mlp.experts.1", "mlp.experts.2"] if experts is listed else []
    assert list(injected(model)) == [*linear, "mlp.proj", "mlp.shared_expert_gate"]


def test_a_linear_of_that_size_without_experts_is_no_router():
    model = Sparse(nn.Linear(4, 3), nn.Identity())
    assert why_not(model, "gate") is None


def test_the_message_for_fused_experts_says_what_to_do():
    model = nn.ModuleDict({"mlp": Sparse(Router(), Bank())})
    with pytest.raises(
        ValueError,
        match=r"mlp\.experts \(a Bank has fused experts \(gate_up_proj, down_proj\): name them in",
    ):
        inject(model, names("experts"))
    with pytest.raises(
        ValueError, match="a parameter of fused experts: name it in target_parameters"
    ):
        inject(model, names("gate_up_proj"))
    with pytest.warns(UserWarning, match="'experts.down_proj' .a parameter of fused experts"):
        inject(model, names("proj", "experts.down_proj"))
