"""Settings without effect give a single warning that says what to do."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, aux_loss, disable_adapters, inject

from ..support.models.llamas import TOKENS, llama, with_experts


def told(function, *arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments)
    return [str(w.message) for w in caught if "lora_moe" in str(w.message)]


def train(model, steps, *, read):
    for _ in range(steps):
        loss = model(TOKENS, labels=TOKENS).loss
        (loss + aux_loss(model) if read else loss).backward()


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_auxiliary_loss_that_nobody_reads(checkpointing):
    model = with_experts().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    (message,) = told(lambda: train(model, 6, read=False))
    assert "add aux_loss(model) to the loss" in message
    assert not told(lambda: train(model, 3, read=False))


def test_one_that_is_read_is_no_news():
    model = with_experts().train()
    before = hooks_of(model)
    assert not told(lambda: train(model, 6, read=True))
    assert hooks_of(model) == before - 1  # the hook is removed


def test_an_evaluation_owes_nothing():
    model = with_experts().eval()
    assert not told(lambda: [model(TOKENS) for _ in range(5)])
    with torch.no_grad():
        assert not told(lambda: [model.train()(TOKENS) for _ in range(5)])


def test_experts_that_something_froze_after_inject():
    model = with_experts().train()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    (message,) = told(lambda: train(model, 3, read=False))
    assert "every expert is frozen" in message and "get_peft_model" in message


def test_get_peft_model_after_inject():
    peft = pytest.importorskip("peft")
    model = inject(llama(), LoraMoeConfig(num_experts=4, r=2, target_modules=("q_proj",)))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"])).train()
    messages = told(lambda: adapted(input_ids=TOKENS, labels=TOKENS).loss.backward())
    assert sum("every expert is frozen" in m for m in messages) == 1


class Reader(nn.Module):
    """Calls one of its linears and reads the weight of the other."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.called(x) @ vars(self)["_modules"]["re" + "ad"].weight


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.always, self.never = Reader(), nn.ModuleList([Reader()])

    def forward(self, x):
        return self.always(x)


def test_a_layer_that_does_not_run_while_its_parent_does():
    config = LoraMoeConfig(num_experts=2, r=2, target_modules=("called", "read"))
    model = inject(Sometimes(), config)
    untouched = copy.deepcopy(model)
    before = hooks_of(model)
    x = torch.randn(3, 4)
    with torch.no_grad(), disable_adapters(model):
        assert not told(model, x)
    (message,) = told(model, x)
    assert "the experts of always.read (1 in all) did not run" in message
    assert "exclude_modules" in message
    assert not told(model, x)
    assert hooks_of(model) == before
    (message,) = told(untouched, x)  # a copy has its own hook
    assert "always.read" in message
