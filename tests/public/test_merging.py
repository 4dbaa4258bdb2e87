"""merge: a fixed mixture merged into the base."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, Routing, inject, injected, merge, use_routing

from ..support.merging import BANKS, C, Conv1D, Model, X, close, mixture, with_experts


@pytest.mark.parametrize("bank", BANKS)
def test_into_the_base(bank):
    model = with_experts(bank)
    expected, base = mixture(model), mixture(model, [0.0] * 3)
    assert (expected - base).abs().max() > 0.1  # the experts change the output
    assert merge(model, C) is model and not injected(model)
    assert type(model.up) is nn.Linear and type(model.down) is Conv1D
    close(model(X), expected)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_the_merged_weight_equals_the_formula():
    model = with_experts("unequal")
    layer, W = model.up, model.up.weight.detach().clone()
    begin = 0
    for c, s, r in zip(C, (4.0, 8 / 3, 1.0), (1, 3, 2)):
        A, B = layer.lora_A[begin : begin + r], layer.lora_B[begin : begin + r]
        W += c * s * B.T @ A
        begin += r
    merge(model, torch.tensor(C))
    close(model.up.weight, W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_sum_is_rounded_once(dtype):
    model = with_experts(model=Model(dtype))
    layer = model.up
    exact = layer.weight.double() + sum(
        C[e]
        * 8
        * layer.lora_B[2 * e : 2 * e + 2].double().T
        @ layer.lora_A[2 * e : 2 * e + 2].double()
        for e in range(3)
    )
    merge(model, C)
    got = model.up.weight
    assert got.dtype == dtype
    assert (
        (got.double() - exact).abs() <= (torch.finfo(dtype).eps + 1e-6) * exact.abs() + 1e-7
    ).all()


def test_coefficients_by_layer_and_a_constant_routing():
    model = with_experts()
    by_layer = {"up": C, "down": torch.tensor([1.0, 2.0, 0.0])}
    routing = {
        path: Routing.from_gates(torch.as_tensor(c).expand(len(X), -1))
        for path, c in by_layer.items()
    }
    with torch.no_grad(), use_routing(model, routing=routing):
        expected = model(X)
    close(merge(model, by_layer)(X), expected, 1e-7)
    model = with_experts()
    ids = torch.tensor([[2, 0, -1, 0]]).expand(len(X), -1)
    decision = Routing.from_ids(ids, torch.full(ids.shape, 0.25), num_experts=3)
    with torch.no_grad(), use_routing(model, routing=decision):
        expected = model(X)
    close(merge(model, decision)(X), expected, 1e-12)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("router", "per-token routing cannot be merged"),
        (None, "cannot be merged"),
        ([1.0, 2.0], "expected 3 finite numbers"),
        ([1.0, math.nan, 0.0], "expected 3 finite numbers"),
        ({"up": C}, "missing \\['down'\\]"),
        ({"up": C, "down": C, "head": C}, "unknown \\['head'\\]"),
        (
            Routing.from_ids(torch.tensor([0, 1]), num_experts=3),
            "per-token routing cannot be merged",
        ),
        (Routing.from_ids(torch.tensor([0, 0]), num_experts=2), "expected 3 finite numbers"),
    ],
)
def test_coefficients_that_are_none(weights, message):
    model = with_experts()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    for into in ("base", "lora"):
        with pytest.raises(ValueError, match=message):
            merge(model, weights, into=into)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


class Int8(nn.Linear):
    """As in bitsandbytes: a subclass of nn.Linear with an integer weight and its own forward."""

    def __init__(self):
        super().__init__(12, 9)
        self.weight = nn.Parameter(torch.ones(9, 12, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class Fancy(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


def replaced(module):
    model = Model(torch.float32)
    model.up = module
    return model


def tied():
    model = Model(torch.float32)
    model.other = nn.Embedding(9, 12)
    model.other.weight = model.up.weight
    return model


def overlapping():
    model = Model(torch.float32)
    flat = torch.zeros(2 * 9 * 12)
    model.up.weight = nn.Parameter(flat[:108].view(9, 12))
    model.register_buffer("flat", flat)
    return model


def hooked():
    model = Model(torch.float32)
    model.up.register_forward_hook(lambda module, args, y: y.clamp(-1, 1))
    return model


def parametrized():
    model = Model(torch.float32)
    nn.utils.parametrizations.weight_norm(model.up)
    return model


def overridden():
    model = Model(torch.float32)
    model.up.forward = lambda x: torch.zeros(len(x), 9)
    return model


REFUSED = {
    "int8": (lambda: replaced(Int8()), "Int8 has an unknown weight format"),
    "int8 with Linear's forward": (
        lambda: replaced(type("Packed", (Int8,), {"forward": nn.Linear.forward})()),
        r"quantized \(torch.int8\)",
    ),
    "custom": (lambda: replaced(Fancy(12, 9)), "Fancy has an unknown weight format"),
    "tied": (tied, "its weight is tied to that of other"),
    "overlapping": (overlapping, "its weight is tied to that of"),
    "hooked": (hooked, "it has forward hooks"),
    "parametrized": (parametrized, "has an unknown weight format"),
    "overridden": (overridden, "has an unknown weight format"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bases_that_cannot_be_merged_into(kind):
    make, message = REFUSED[kind]
    model = with_experts(model=make())
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"up: .*{message}"):
        merge(model, C)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert len(injected(model)) == 2
    if kind == "int8 with Linear's forward":
        return
    x = X.float()
    expected = mixture(model, x=x)
    with torch.no_grad():  # merging into a LoRA still works
        close(merge(model, C, into="lora")(x), expected, 1e-5)


def test_a_base_with_two_names_is_merged_once():
    model = Model()
    model.again = model.up
    inject(model, LoraMoeConfig(num_experts=3, r=2, target_modules=("up", "again")))
    nn.init.normal_(model.up.lora_B)
    expected = mixture(model)
    assert model.again is model.up
    merge(model, C)
    assert model.again is model.up and type(model.up) is nn.Linear
    close(model(X), expected)


def test_an_overflow_changes_nothing():
    model = with_experts(model=Model(torch.float16))
    with torch.no_grad():
        model.down.lora_B.mul_(1e6)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"down: expected a finite sum in torch.float16"):
        merge(model, C)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_sharded_weights():
    model = with_experts()
    model.up.weight.ds_id = 1  # ZeRO-3 marks its parameters this way
    with pytest.raises(ValueError, match="up: its weight is sharded"):
        merge(model, C)
    model.down.lora_B.ds_id = 2
    for into in ("base", "lora"):
        with pytest.raises(ValueError, match="down: its experts are sharded"):
            merge(model, C, into=into)


def test_a_middle_is_no_matrix():
    from lora_moe.components import register
    from lora_moe.middle import Middle

    @register
    @dataclasses.dataclass(frozen=True)
    class Odd(Middle):
        kind = "test odd"

    try:
        with pytest.raises(ValueError, match="up: with its middle Odd it is not a sum"):
            merge(with_experts(middle=Odd()), C)
    finally:
        Middle.known.pop("test odd")


def test_meta_and_wrappers():
    model = with_experts(model=Model(torch.float32))
    model.up.base_layer.to("meta")
    with pytest.raises(ValueError, match="up: its weight is on meta"):
        merge(model, C)
    with pytest.raises(ValueError, match="expected the unwrapped model, got a DataParallel"):
        merge(nn.DataParallel(with_experts()), C)
    with pytest.raises(ValueError, match="got none"):
        merge(Model(), C)
    with pytest.raises(ValueError, match="into: expected 'base' or 'lora'"):
        merge(model, C, into="mean")
    with pytest.raises(ValueError, match="r: expected None with into='base'"):
        merge(model, C, r=3)
