"""Merging a fixed mixture: into the base, into one LoRA, with Graft's coefficients."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import lora_moe
from lora_moe import LoraMoeConfig, Routing, graft_weights, inject, injected, merge, use_routing

X = torch.randn(7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
C = [0.5, 0.0, -1.25]
BANKS = {
    "equal": {"r": 2},
    "unequal": {"r": (1, 3, 2), "alpha": (4.0, 8.0, 2.0)},
    "shared": {"r": 3, "shared_a": True, "use_rslora": True},
}


class Conv1D(nn.Module):
    """transformers' Conv1D: the weight is (D_in, D_out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Model(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 9), Conv1D(5, 9)
        self.head = nn.Linear(5, 4, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))


def with_experts(bank="equal", model=None, **fields):
    fields = BANKS[bank] | {"num_experts": 3, "target_modules": ("up", "down")} | fields
    model = inject(model or Model(), LoraMoeConfig(**fields))
    for layer in injected(model).values():
        nn.init.normal_(layer.lora_B)
    return model


def mixture(model, c=C, x=X):
    """The model with every token's experts weighted by c."""
    gates = torch.tensor(c, dtype=torch.float64).expand(len(x), -1)
    with torch.no_grad(), use_routing(model, routing=Routing.from_gates(gates)):
        return model(x)


def close(got, expected, bound=1e-12):
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= bound, float(error)


# --- into the base -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bank", BANKS)
def test_into_the_base(bank):
    model = with_experts(bank)
    expected, base = mixture(model), mixture(model, [0.0] * 3)
    assert (expected - base).abs().max() > 0.1  # the experts have a say
    assert merge(model, C) is model and not injected(model)
    assert type(model.up) is nn.Linear and type(model.down) is Conv1D
    close(model(X), expected)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_the_weight_is_the_formulas():
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
        ("router", "a router decides for each token, and cannot be merged"),
        (None, "cannot be merged"),
        ([1.0, 2.0], "expected 3 finite numbers"),
        ([1.0, math.nan, 0.0], "expected 3 finite numbers"),
        ({"up": C}, "missing \\['down'\\]"),
        ({"up": C, "down": C, "head": C}, "unknown \\['head'\\]"),
        (
            Routing.from_ids(torch.tensor([0, 1]), num_experts=3),
            "a routed mixture cannot be merged",
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


# --- bases that are refused --------------------------------------------------------------------------


class Int8(nn.Linear):
    """As bitsandbytes': a subclass of nn.Linear with integers as weight, and a forward of its own."""

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
    "int8": (lambda: replaced(Int8()), "Int8 keeps its weight in a way of its own"),
    "int8 with Linear's forward": (
        lambda: replaced(type("Packed", (Int8,), {"forward": nn.Linear.forward})()),
        r"quantised \(torch.int8\)",
    ),
    "custom": (lambda: replaced(Fancy(12, 9)), "Fancy keeps its weight"),
    "tied": (tied, "its weight is tied to that of other"),
    "overlapping": (overlapping, "its weight is tied to that of"),
    "hooked": (hooked, "it has forward hooks"),
    "parametrized": (parametrized, "keeps its weight in a way of its own"),
    "overridden": (overridden, "keeps its weight in a way of its own"),
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
    with torch.no_grad():  # what remains possible
        close(merge(model, C, into="lora")(x), expected, 1e-5)


def test_a_base_that_stands_under_two_names_is_merged_once():
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
    with pytest.raises(ValueError, match=r"down: expected a sum that torch.float16 holds"):
        merge(model, C)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_sharded_weights():
    model = with_experts()
    model.up.weight.ds_id = 1  # as ZeRO-3 marks its parameters
    with pytest.raises(ValueError, match="up: its weight is sharded"):
        merge(model, C)
    model.down.lora_B.ds_id = 2
    for into in ("base", "lora"):
        with pytest.raises(ValueError, match="down: its experts are sharded"):
            merge(model, C, into=into)


def test_a_middle_is_no_matrix():
    from lora_moe.middle import Middle
    from lora_moe.parts import register

    @register
    @dataclasses.dataclass(frozen=True)
    class Odd(Middle):
        kind = "test odd"

    try:
        with pytest.raises(ValueError, match="up: its middle, Odd, makes it more than a sum"):
            merge(with_experts(middle=Odd()), C)
    finally:
        Middle.known.pop("test odd")


def test_meta_and_wrappers():
    model = with_experts(model=Model(torch.float32))
    model.up.base_layer.to("meta")
    with pytest.raises(ValueError, match="up: its weight is on meta"):
        merge(model, C)
    with pytest.raises(ValueError, match="expected the plain model, got DataParallel"):
        merge(nn.DataParallel(with_experts()), C)
    with pytest.raises(ValueError, match="got none"):
        merge(Model(), C)
    with pytest.raises(ValueError, match="into: expected 'base' or 'lora'"):
        merge(model, C, into="mean")
    with pytest.raises(ValueError, match="r: expected None with into='base'"):
        merge(model, C, r=3)


# --- into one LoRA -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bank", BANKS)
def test_into_one_lora(bank):
    model = with_experts(bank)
    expected = mixture(model)
    merge(model, C, into="lora")
    ranks = {"equal": 4, "unequal": 3, "shared": 3}  # without the expert whose coefficient is zero
    assert {layer.config.ranks for layer in injected(model).values()} == {(ranks[bank],)}
    close(model(X), expected)
    close(mixture(model, [1.0]), expected)


def test_a_lower_rank_is_the_nearest():
    model = with_experts("unequal")
    layer = model.up
    exact = sum(
        c * s * layer.lora_B[i:j].T @ layer.lora_A[i:j]
        for c, s, i, j in zip((1, 1, 1), layer.scales, layer.offsets, layer.offsets[1:])
    )
    merge(model, [1.0] * 3, into="lora", r=2)
    got = model.up.lora_B.T @ model.up.lora_A
    u, s, vh = torch.linalg.svd(exact)
    close(got, (u[:, :2] * s[:2]) @ vh[:2])
    for wrong in (0, True, 2000):
        with pytest.raises(ValueError, match=r"r: expected an integer in \[1, 1024\]"):
            merge(with_experts(), C, into="lora", r=wrong)


def test_nothing_left_is_a_lora_of_zeros():
    model = with_experts()
    base = mixture(model, [0.0] * 3)
    merge(model, [0.0] * 3, into="lora")
    assert torch.equal(model(X), base)


def test_the_one_lora_trains_as_the_bank_did():
    model = with_experts(model=Model(torch.float32), dropout=0.25)
    model.up.lora_A.requires_grad_(False)
    merge(model.train(), C, into="lora")
    assert model.up.config.dropout == 0.25 and model.up.training
    assert not model.up.lora_A.requires_grad and model.up.lora_B.requires_grad
    assert not model.up.base_layer.weight.requires_grad


# --- Graft -------------------------------------------------------------------------------------------


def updates(layer):
    offsets = layer.offsets
    A = layer.lora_A if not layer.config.shared_a else layer.lora_A.repeat(3, 1)
    return [s * layer.lora_B[i:j].T @ A[i:j] for s, i, j in zip(layer.scales, offsets, offsets[1:])]


@pytest.mark.parametrize("bank", BANKS)
def test_graft_weights_are_the_formulas(bank):
    model = with_experts(bank)
    got = graft_weights(model, local=0.25, compatibility=2.0, total=1.5)
    M = {path: updates(layer) for path, layer in injected(model).items()}
    for path, own in M.items():
        q = []
        for e in range(3):
            a = own[e].norm() / sum(m.norm() for m in own)
            energy = [M[p][e].norm() ** 2 for p in M]
            p = [value / sum(energy) for value in energy]
            h = -sum(v * v.log() for v in p) / math.log(2)
            cosines = [
                (own[e] * own[f]).sum() / own[e].norm() / own[f].norm() for f in range(3) if f != e
            ]
            k = sum((1 + c) / 2 for c in cosines) / 2
            q.append(a**0.25 * h**0.75 * k**2)
        close(got[path], 1.5 * torch.stack(q) / sum(q))


def test_graft_of_experts_without_an_update():
    model = with_experts()
    with torch.no_grad():
        for layer in injected(model).values():
            layer.lora_B[2:4] = 0
    assert all(c[1] == 0 and abs(c.sum() - 1) < 1e-12 for c in graft_weights(model).values())
    expected = mixture(model, [0.5, 0.5, 0.5])
    merged = merge(model, graft_weights(model, local=0.0, compatibility=0.0), into="lora")
    assert torch.isfinite(merged(X)).all() and not torch.equal(merged(X), expected)
    fresh = inject(Model(), LoraMoeConfig(num_experts=3, r=2, target_modules=("up",)))
    assert not graft_weights(fresh)["up"].any()


def test_graft_refuses():
    with pytest.raises(ValueError, match=r"local: expected a number in \[0, 1\], got 2"):
        graft_weights(with_experts(), local=2)
    with pytest.raises(ValueError, match="compatibility: expected a number of at least 0"):
        graft_weights(with_experts(), compatibility=-1)
    model = inject(Model(), LoraMoeConfig(num_experts=3, target_modules=("up",)))
    inject(model, LoraMoeConfig(num_experts=2, target_modules=("down",)))
    with pytest.raises(ValueError, match=r"as many experts in each layer, got \[2, 3\]"):
        graft_weights(model)


# --- PEFT --------------------------------------------------------------------------------------------


def test_peft_computes_the_one_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = with_experts(model=Model(torch.float32), target_modules=("up",))
    x = X.float()
    expected = mixture(model, x=x)
    (folder,) = lora_moe.to_peft(merge(model, C, into="lora"), tmp_path)
    theirs = peft.PeftModel.from_pretrained(Model(torch.float32), folder)
    with torch.no_grad():
        close(theirs(x), expected, 1e-5)
