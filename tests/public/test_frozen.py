"""freeze_experts in one process: frozen rows keep their bits under every optimizer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, freeze_experts, inject, injected, load_adapter, save_adapter

RANKS = (1, 3, 2)  # expert 1 owns rows 1, 2 and 3
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "SGD, nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD, maximize": lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=0.1, maximize=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.1),
}


def model(**fields):
    torch.manual_seed(0)
    config = {"num_experts": 3, "r": RANKS, "top_k": 3, "target_modules": ("0", "2")} | fields
    adapted = inject(
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), LoraMoeConfig(**config)
    )
    for layer in injected(adapted).values():
        nn.init.normal_(layer.lora_B)
    return adapted


def tensors(adapted):
    return {
        f"{path}.{name}": getattr(layer, name).detach().clone()
        for path, layer in injected(adapted).items()
        for name in ("lora_A", "lora_B", "router_weight")
    }


def train(adapted, optimizer, steps=3):
    def loss():
        optimizer.zero_grad()
        value = adapted(torch.linspace(-1, 1, 24).view(4, 6)).square().mean()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)


def expect_still(before, after, rows=slice(1, 4)):
    """Exactly these rows keep their bits; all others change."""
    for name, tensor in after.items():
        same = (tensor == before[name]).all(1)
        still = torch.zeros_like(same)
        if not name.endswith("router_weight"):
            still[rows] = True
        assert torch.equal(same, still), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_rows_keep_their_bits(name):
    """The optimizer was created before freezing and already holds momentum."""
    adapted = model()
    optimizer = OPTIMIZERS[name]([p for p in adapted.parameters() if p.requires_grad])
    train(adapted, optimizer)
    freeze_experts(adapted, 1)
    before = tensors(adapted)
    train(adapted, optimizer)
    expect_still(before, tensors(adapted))
    freeze_experts(adapted, None)
    before = tensors(adapted)
    train(adapted, optimizer)
    expect_still(before, tensors(adapted), rows=slice(0, 0))


def test_lbfgs_evaluates_in_between():
    adapted = model()
    freeze_experts(adapted, [1])
    before = tensors(adapted)
    train(adapted, torch.optim.LBFGS([p for p in adapted.parameters() if p.requires_grad]), 1)
    expect_still(before, tensors(adapted))


class DecayThenAdamW(torch.optim.AdamW):
    """Overrides step and calls the base class's step."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)
        return super().step(closure)


def test_a_step_that_calls_the_step_of_its_base_class():
    adapted = model()
    freeze_experts(adapted, [1])
    before = tensors(adapted)
    train(adapted, DecayThenAdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1))
    expect_still(before, tensors(adapted))


def test_a_step_that_raises_spoils_no_later_one():
    adapted = model()
    freeze_experts(adapted, [1])
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    with torch.no_grad():
        for layer in injected(adapted).values():
            layer.lora_B.fill_(2)
    before = tensors(adapted)
    train(adapted, optimizer)
    expect_still(before, tensors(adapted))


def test_an_optimizer_for_each_parameter():
    """Optimizers that step inside backward; each restores its own parameter only."""
    adapted = model()
    freeze_experts(adapted, [1])
    before = tensors(adapted)
    for parameter in [p for p in adapted.parameters() if p.requires_grad]:
        optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)
        parameter.register_post_accumulate_grad_hook(lambda p, o=optimizer: o.step())
    for _ in range(2):
        adapted(torch.linspace(-1, 1, 24).view(4, 6)).square().mean().backward()
    expect_still(before, tensors(adapted))


def test_a_step_that_is_compiled():
    adapted = model()
    optimizer = OPTIMIZERS["AdamW"]([p for p in adapted.parameters() if p.requires_grad])
    freeze_experts(adapted, [1])
    before = tensors(adapted)
    adapted(torch.linspace(-1, 1, 24).view(4, 6)).square().mean().backward()
    torch.compile(optimizer.step, backend="eager")()
    expect_still(before, tensors(adapted))


def test_experts_without_a_gap():
    adapted = model()
    freeze_experts(adapted, [0, 1])
    before = tensors(adapted)
    train(adapted, OPTIMIZERS["SGD"]([p for p in adapted.parameters() if p.requires_grad]))
    expect_still(before, tensors(adapted), rows=slice(0, 4))


def test_a_shared_a_is_not_frozen():
    adapted = model(r=2, shared_a=True)
    freeze_experts(adapted, [1])
    before = tensors(adapted)
    train(adapted, OPTIMIZERS["SGD"]([p for p in adapted.parameters() if p.requires_grad]))
    after = tensors(adapted)
    for name in ("0.lora_A", "2.lora_A"):
        assert (after.pop(name) != before[name]).all(1).all()
    expect_still(before, after, rows=slice(2, 4))


@pytest.mark.parametrize("way", ["saved", "copied"])
def test_frozen_experts_survive_saving_and_copying(way, tmp_path):
    adapted = model()
    freeze_experts(adapted, [1])
    if way == "saved":
        save_adapter(adapted, tmp_path)
        other = load_adapter(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), tmp_path)
    else:
        other = copy.deepcopy(adapted)
    before = tensors(other)
    train(other, OPTIMIZERS["SGD"]([p for p in other.parameters() if p.requires_grad]))
    expect_still(before, tensors(other))


def test_flat_shards_are_refused():
    """A flat shard as in FSDP1, or a flat copy as ZeRO steps it."""
    adapted = model()
    freeze_experts(adapted, [1])
    layer = adapted[0]
    flat = nn.Parameter(torch.zeros(40))
    layer.lora_A._hp_mapping = SimpleNamespace(hp_fragment=flat.data[10:20])
    optimizer = OPTIMIZERS["SGD"]([p for p in adapted.parameters() if p.requires_grad])
    optimizer.step()  # does not hold the flat parameter yet
    optimizer.add_param_group({"params": [flat]})
    with pytest.raises(RuntimeError, match=r"ZeRO.*train with DDP or FSDP2"):
        optimizer.step()
    del layer.lora_A._hp_mapping
    layer.lora_A.data = layer.lora_A.data.flatten()[:7]
    with pytest.raises(RuntimeError, match=r"expected 6 rows .* got a shard \(7,\).*not FSDP1"):
        optimizer.step()
