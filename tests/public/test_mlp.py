"""LoraMoeMLP: equal to its formula, one whole FFN per expert, in fp64; and its effect on the base."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, Routing, backend_info, disable_adapters, use_routing
from lora_moe.linear import ffn_width
from lora_moe.mlp import LoraMoeMLP

GPU = backend_info()["serving"]["cpu"] in ("triton", "cuda")  # whose kernels have no fp64
DTYPE = torch.float32 if GPU else torch.float64
NEAR = {"rtol": 1e-4, "atol": 2e-5} if GPU else {"rtol": 1e-12, "atol": 1e-12}
D, F, E, R = 6, 10, 4, 3
B, L = 2, 5


class Gated(nn.Module):
    """Llama's form."""

    def __init__(self, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(D, F, bias) for _ in range(2))
        self.down_proj = nn.Linear(F, D, bias)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    """BERT's and GPT's form, with biases, and dropout as T5 has it."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.fc2(self.dropout(self.act(self.fc1(x))))


class Fused(nn.Module):
    """Phi-3's form: gate and up in one."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(D, 2 * F, False), nn.Linear(F, D, False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * nn.functional.silu(gate))


class Residual(nn.Module):
    """Bloom's form: it adds what it was given; and an argument more."""

    def __init__(self):
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(D, F), nn.Linear(F, D)

    def forward(self, x, residual):
        return residual + self.dense_4h_to_h(torch.tanh(self.dense_h_to_4h(x)))


FFNS = {
    "gated": (Gated, ("gate_proj", "up_proj", "down_proj")),
    "gated, biases": (lambda: Gated(True), ("gate_proj", "up_proj", "down_proj")),
    "down alone": (lambda: Gated(True), ("down_proj",)),
    "gate alone": (lambda: Gated(True), ("gate_proj",)),
    "all but down": (Gated, ("up_proj", "gate_proj")),
    "plain": (Plain, ("fc1", "fc2")),
    "fused": (Fused, ("gate_up_proj", "down_proj")),
}
every_ffn = pytest.mark.parametrize("ffn", FFNS)
ROUTERS = {
    "top-2": {},
    "top-1, its gate": {"top_k": 1},
    "dense sigmoid": {"top_k": E, "gate": "sigmoid", "renormalize": False},
    "top-p": {"top_k": E, "top_p": 0.6, "renormalize": False},
    "threshold": {"top_k": 2, "threshold": 0.55, "renormalize": False, "router_bias": True},
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


def formula(layer, p, x, routing):
    """sum over slots of w FFN_e(x), token by token; a token without experts is the FFN's."""
    rows, base = x.reshape(-1, D), expert(layer, {}, 0)
    logits = rows @ p["router_weight"].T + p.get("router_bias", 0)
    gates = torch.softmax(logits, 1) if layer.config.gate == "softmax" else torch.sigmoid(logits)
    out = []
    for t, ids in enumerate(routing.indices.tolist()):
        ids = [e for e in ids if e >= 0]
        total = sum(gates[t, e] for e in ids) if layer.config.normalizes else 1
        terms = [gates[t, e] / total * expert(layer, p, e)(rows[t : t + 1]) for e in ids]
        out.append(sum(terms) if terms else base(rows[t : t + 1]))
    return torch.cat(out).view(x.shape)


@pytest.mark.parametrize("router", ROUTERS)
@every_ffn
def test_equals_its_formula(ffn, router):
    layer, x = layer_of(ffn, **ROUTERS[router]), input_of()
    y = layer(x)
    p = {k: t.detach().clone().requires_grad_() for k, t in layer.adapter_state().items()}
    wide = x.detach().clone().requires_grad_()
    want = formula(layer, p, wide, layer.routing)
    torch.testing.assert_close(y, want, **NEAR)
    assert (want - layer.base_layer(x)).abs().max() > 0.1
    if router in ("top-p", "threshold"):
        assert (layer.routing.indices < 0).any()
    if router == "threshold":
        assert (layer.routing.indices < 0).all(1).any()
    dy = torch.randn_like(want)
    y.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(x.grad, wide.grad, **NEAR)
    for key, tensor in layer.adapter_state().items():
        torch.testing.assert_close(
            tensor.grad, p[key].grad, **NEAR, msg=lambda m, k=key: f"{k}: {m}"
        )
        assert p[key].grad.abs().max() > 1e-6, key


@pytest.mark.parametrize(
    "fields", [{"shared_a": True}, {"r": (1, 4, 2, 3), "alpha": (1.0, 2.0, 3.0, 4.0)}], ids=str
)
def test_one_a_for_all_and_unequal_ranks(fields):
    layer, x = layer_of("gated", **fields), input_of()
    want = formula(layer, layer.adapter_state(), x, (layer(x), layer.routing)[1])
    torch.testing.assert_close(layer(x), want, **NEAR)


@every_ffn
def test_a_token_without_experts_is_the_ffn_bit_for_bit(ffn):
    layer, x = layer_of(ffn, dtype=torch.float32), input_of(torch.float32)
    ids = torch.tensor([[0, 1], [-1, -1], [2, -1], [-1, -1], [-1, 3]]).repeat(2, 1)
    with use_routing(layer, routing=Routing.from_ids(ids, num_experts=E)), torch.no_grad():
        y = layer(x).view(-1, D)
    base = expert(layer, {}, 0)(x).view(-1, D)
    none = (ids < 0).all(1)
    assert torch.equal(y[none], base[none])
    assert ((y - base).abs().amax(1)[~none] > 1e-3).all()


def test_b_of_zeros_is_the_ffn():
    layer, x = layer_of("gated, biases", dtype=torch.float32), input_of(torch.float32)
    for _, lora_B in layer.pairs():
        nn.init.zeros_(lora_B)
    torch.testing.assert_close(layer(x), expert(layer, {}, 0)(x), rtol=1e-6, atol=1e-6)


def test_an_ffn_that_takes_more_and_adds_it():
    torch.manual_seed(0)
    names = ("dense_h_to_4h", "dense_4h_to_h")
    config = LoraMoeConfig(num_experts=E, r=R, placement="ffn", target_modules=names)
    layer = LoraMoeMLP(Residual().to(DTYPE), config)
    for tensor in layer.adapter_state().values():
        nn.init.normal_(tensor, std=0.7)
    x, residual = input_of(), input_of(seed=5)
    bare = LoraMoeMLP(copy.deepcopy(layer.base_layer), config)
    bare.load_state_dict(layer.state_dict())
    y = layer(x, residual=residual)
    torch.testing.assert_close(y - residual, bare(x, 0 * residual), **NEAR)


def test_the_callers_routing_and_frozen_experts():
    layer, x = layer_of("gated"), input_of()
    layer.frozen = (1,)
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [1, 3]]).repeat(2, 1)
    weights = torch.rand(B * L, 2, dtype=DTYPE, requires_grad=True)
    with use_routing(layer, routing=Routing.from_ids(ids, weights, num_experts=E)):
        y = layer(x)
    rows = x.view(-1, D)
    want = torch.cat(
        [
            sum(w * expert(layer, layer.adapter_state(), e)(rows[t : t + 1]) for e, w in zip(i, v))
            for t, (i, v) in enumerate(zip(ids.tolist(), weights))
        ]
    )
    torch.testing.assert_close(y.view(-1, D), want, **NEAR)
    y.square().sum().backward()
    assert weights.grad.abs().min() > 0 and not layer.router_weight.grad.any()
    for A, B_ in layer.pairs():
        for t in (A, B_):
            assert t.grad.any() and not t.grad[layer.offsets[1] : layer.offsets[2]].any()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast):
    layer = layer_of("gated", dtype=torch.float32)
    wide, x = copy.deepcopy(layer).to(DTYPE), input_of(torch.float32)
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
    else:
        layer.base_layer.to(torch.bfloat16)
        y = layer(x.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    r = layer.routing
    routing = Routing.from_ids(r.indices, r.weights.to(DTYPE), num_experts=E)
    with use_routing(wide, routing=routing):
        want = wide(x.to(DTYPE))
    assert (y - want).norm() < 0.02 * want.norm()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in layer.adapter_state().values())


def test_dropout_is_on_the_experts_input_alone():
    layer, x = layer_of("gated", dropout=0.5), input_of()
    layer.train()
    for _, lora_B in layer.pairs():
        nn.init.zeros_(lora_B)
    torch.testing.assert_close(layer(x), expert(layer, {}, 0)(x), **NEAR)
    nn.init.normal_(layer.lora_B_up_proj)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_copies_and_pickles_have_hooks_of_their_own():
    layer, x = layer_of("gated"), input_of()
    y = layer(x)
    other = copy.deepcopy(layer)
    nn.init.zeros_(other.lora_B_up_proj)
    assert torch.equal(layer(x), y) and not torch.equal(other(x), y)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x), y) and again.routing is not None
    assert again.base_layer.up_proj._forward_hooks.popitem()[1].layer is again


def test_without_adapters_and_released_it_is_the_base():
    layer, x = layer_of("gated"), input_of()
    want = expert(layer, {}, 0)(x)
    with disable_adapters(layer):
        assert torch.equal(layer(x), want)
    assert torch.equal(layer.base_layer(x), want)  # by itself, outside of the layer
    layer.release()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layer.base_layer.modules())


def test_some_models_look_at_its_linear_maps():
    layer = layer_of("gated")
    assert layer.down_proj is layer.base_layer.down_proj
    with pytest.raises(AttributeError, match="w1"):
        _ = layer.w1


class Mixing(Gated):
    def forward(self, x):
        return super().forward(x) + self.up_proj(x).mean() * 0


class Reshaping(Gated):
    def forward(self, x):
        return self.down_proj(self.up_proj(x).reshape(-1, F)) + 0 * self.gate_proj(x).sum()


class Idle(Gated):
    def forward(self, x):
        return self.down_proj(self.up_proj(x))


@pytest.mark.parametrize("kind", [Mixing, Reshaping, Idle])
def test_an_ffn_of_another_form_is_told(kind):
    names = ("gate_proj", "up_proj", "down_proj")
    config = LoraMoeConfig(num_experts=E, r=R, placement="ffn", target_modules=names)
    layer = LoraMoeMLP(kind(), config)
    with pytest.raises(
        RuntimeError, match="expected an FFN whose forward calls each linear map once"
    ):
        layer(torch.randn(B, L, D))
    from lora_moe.context import thread

    assert not thread.passes


def test_what_is_an_ffn():
    class Attention(nn.Module):
        def __init__(self, D=8, d=8):
            super().__init__()
            self.q, self.k, self.v, self.o = (
                nn.Linear(*s) for s in [(D, D), (D, d), (D, d), (D, D)]
            )

    assert ffn_width(Gated()) == ffn_width(Plain()) == ffn_width(Fused()) == D
    assert ffn_width(Attention()) is ffn_width(Attention(d=4)) is ffn_width(nn.Linear(2, 2)) is None
    same = type("SquareMLP", (nn.Module,), {})()
    same.up, same.down = nn.Linear(4, 4), nn.Linear(4, 4)
    assert ffn_width(same) == 4


@pytest.mark.parametrize(
    "base, fields, error, message",
    [
        (nn.Linear(2, 2), {}, TypeError, "base: expected an FFN"),
        (Gated(), {"target_modules": ("w1",)}, ValueError, "target_modules: expected names of"),
        (Gated(), {"target_modules": ()}, ValueError, "target_modules: expected names of"),
    ],
)
def test_what_does_not_fit_raises(base, fields, error, message):
    config = {"num_experts": E, "r": R, "placement": "ffn", "target_modules": ("up_proj",)} | fields
    with pytest.raises(error, match=message):
        LoraMoeMLP(base, LoraMoeConfig(**config))
