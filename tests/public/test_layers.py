"""LoraMoeLinear against literal loops over tokens and experts, and with PyTorch's features."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_moe import LoraMoeConfig, LoraMoeLinear, Routing

from ..support.compare import assert_accurate, relative_error

D_IN, D_OUT = 24, 20
PARAMETERS = ("lora_A", "lora_B", "router_weight")
CONFIGS = {
    "defaults": LoraMoeConfig(num_experts=4, r=3, alpha=4),
    "sigmoid": LoraMoeConfig(num_experts=4, r=3, alpha=4, gate="sigmoid", renormalize=False),
    "unequal-ranks": LoraMoeConfig(num_experts=3, r=[1, 6, 2], alpha=5),
    "shared-a": LoraMoeConfig(num_experts=4, r=3, alpha=4, shared_a=True),
    "dense": LoraMoeConfig(num_experts=3, r=2, top_k=3, alpha=3),
    "selection-bias": LoraMoeConfig(num_experts=4, r=3, alpha=4, selection_bias=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make(config=CONFIGS["defaults"], base=None, seed=0):
    """A layer with a B of order one and routers that disagree about the tokens."""
    torch.manual_seed(seed)
    layer = LoraMoeLinear(base or nn.Linear(D_IN, D_OUT), config)
    nn.init.normal_(layer.lora_B)
    nn.init.normal_(layer.router_weight, std=0.5)
    if layer.selection_bias is not None:
        layer.selection_bias.copy_(torch.rand(config.num_experts))
    return layer


def tokens(*shape, seed=1):
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(seed))


def gates_by_loop(config, w, bias, x):
    """[(expert, weight), ...] of each token, in fp64."""
    picked = []
    for row in x:
        logits = torch.stack([row @ w[e] for e in range(config.num_experts)])
        p = torch.softmax(logits, 0) if config.gate == "softmax" else torch.sigmoid(logits)
        score = p if bias is None else p + bias
        order = sorted(range(config.num_experts), key=lambda e: (-score[e].item(), e))
        ids = order[: config.top_k]
        total = sum(p[e] for e in ids) if config.normalizes else 1
        picked.append([(e, p[e] / total) for e in ids])
    return picked


def experts_by_loop(config, a, b, x, picked):
    """sum over picked e of  g_te (alpha / r_e) B_e A_e x_t, in fp64.  (T, D_in) -> (T, D_out)"""
    rows, start = [], 0
    for r in config.ranks:
        rows.append(range(start, start + r))
        start += r
    out = []
    for row, choice in zip(x, picked, strict=True):
        y = torch.zeros(b.shape[1], dtype=torch.float64)
        for e, g in choice:
            for j, i in enumerate(rows[e]):
                s = row @ a[j if config.shared_a else i]
                y = y + g * config.alpha / config.ranks[e] * s * b[i]
        out.append(y)
    return torch.stack(out)


def in_double(layer):
    adapter = [layer.get_parameter(name).detach().double().requires_grad_() for name in PARAMETERS]
    bias = layer.selection_bias
    return *adapter, None if bias is None else bias.double()


def by_loop(layer, x, mask=1.0):
    """The layer's output and its gradients for a sum over y, by loops and autograd in fp64."""
    a, b, w, bias = in_double(layer)
    x = x.detach().double().flatten(0, -2).requires_grad_()
    picked = gates_by_loop(layer.config, w, bias, x)
    y = nn.functional.linear(x, layer.weight.double(), layer.bias.double())
    y = y + experts_by_loop(layer.config, a, b, x * mask, picked)
    return y, dict(zip(("x", *PARAMETERS), (x, a, b, w), strict=True))


@every_config
def test_forward_and_gradients_equal_the_loops(config):
    layer, x = make(config), tokens(2, 6).requires_grad_()
    y = layer(x)
    want, leaves = by_loop(layer, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(dy)
    want.backward(dy.double().flatten(0, 1))
    assert_accurate("y", y.flatten(0, 1), want, units=8)
    grads = {"x": x.grad.flatten(0, 1)} | {n: layer.get_parameter(n).grad for n in PARAMETERS}
    for name, grad in grads.items():
        assert_accurate(f"d{name}", grad, leaves[name].grad, units=16)


@every_config
def test_starts_as_the_base_bit_for_bit(config):
    layer = LoraMoeLinear(nn.Linear(D_IN, D_OUT), config)
    x = tokens(7)
    assert torch.equal(layer(x), layer.base_layer(x))
    nn.init.ones_(layer.lora_B)
    assert not torch.equal(layer(x), layer.base_layer(x))


def test_initial_values_come_from_torchs_generator():
    config = LoraMoeConfig(num_experts=16, r=16)
    first, again, other = (
        (torch.manual_seed(seed), LoraMoeLinear(nn.Linear(64, 8), config))[1] for seed in (0, 0, 1)
    )
    for name in PARAMETERS:
        assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.lora_A, other.lora_A)
    bound = 64**-0.5
    assert 0.9 * bound < float(first.lora_A.detach().abs().max()) <= bound
    assert first.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert first.router_weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not first.lora_B.any()


def test_idle_experts_get_exact_zeros_not_none():
    layer = make()
    layer.given = Routing.from_ids(torch.full((5,), 2), num_experts=4)
    layer(tokens(5)).sum().backward()
    busy = torch.zeros(12, dtype=torch.bool)
    busy[6:9] = True
    for grad in (layer.lora_A.grad, layer.lora_B.grad):
        assert torch.equal(grad.any(1), busy)
    assert not layer.router_weight.grad.any()  # the caller decided; DDP waits for a gradient


def test_frozen_experts_get_exact_zeros():
    layer, frozen, x = make(), make(), tokens(9)
    frozen.frozen = (1, 3)
    for module in (layer, frozen):
        module(x).sum().backward()
    kept = torch.tensor([True, False, True, False]).repeat_interleave(3)
    for name in ("lora_A", "lora_B"):
        full, part = layer.get_parameter(name).grad, frozen.get_parameter(name).grad
        assert full[~kept].any() and not part[~kept].any()
        assert torch.equal(full[kept], part[kept])


# --- what it stands for --------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As in transformers: the weight lies transposed."""

    def __init__(self):
        super().__init__()
        self.nf, self.nx = D_OUT, D_IN
        self.weight = nn.Parameter(torch.randn(D_IN, D_OUT) * 0.2)
        self.bias = nn.Parameter(torch.randn(D_OUT))

    def forward(self, x):
        return x @ self.weight + self.bias


class Quantised(nn.Module):
    """An integer weight and a scale: nothing of it says which dtype an adapter should have."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = D_IN, D_OUT
        weight = torch.randint(-8, 8, (D_OUT, D_IN), dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


class WeightOnly(nn.Module):
    """Sizes are known from the weight's shape alone; the forward takes more than x."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D_OUT, D_IN))

    def forward(self, x, shift, *, factor=1.0):
        return x @ self.weight.T * factor + shift


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, Quantised, WeightOnly])
def test_linear_like_bases(kind):
    base = kind(D_IN, D_OUT) if kind is nn.Linear else kind()
    layer, x = make(base=base), tokens(3, 2)
    args, kwargs = ((2.0,), {"factor": 3.0}) if kind is WeightOnly else ((), {})
    assert (layer.in_features, layer.out_features) == (D_IN, D_OUT)
    assert layer.lora_A.dtype == torch.float32 and layer.lora_B.shape == (12, D_OUT)
    a, b, w, _ = in_double(layer)
    rows = x.double().flatten(0, 1)
    experts = experts_by_loop(layer.config, a, b, rows, gates_by_loop(layer.config, w, None, rows))
    want = base(x, *args, **kwargs).double().flatten(0, 1) + experts
    assert_accurate("y", layer(x, *args, **kwargs).flatten(0, 1), want, units=16)


def test_weight_and_bias_are_the_bases():
    base = nn.Linear(D_IN, D_OUT, dtype=torch.bfloat16)
    layer = make(base=base)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert set(dict(layer.named_parameters())) == {
        *PARAMETERS,
        "base_layer.weight",
        "base_layer.bias",
    }


@pytest.mark.parametrize(
    "module", [nn.Embedding(8, 4), nn.LayerNorm(8), nn.Conv2d(2, 2, 1), nn.LazyLinear(4)], ids=repr
)
def test_other_modules_are_refused(module):
    with pytest.raises(TypeError, match=type(module).__name__):
        LoraMoeLinear(module, CONFIGS["defaults"])


def test_a_layer_is_not_wrapped_twice():
    with pytest.raises(TypeError, match="LoraMoeLinear"):
        LoraMoeLinear(make(), CONFIGS["defaults"])


def test_a_base_that_returns_no_tensor_is_refused():
    base = nn.Linear(D_IN, D_OUT)
    base.register_forward_hook(lambda module, args, out: (out, None))
    with pytest.raises(TypeError, match="tuple"):
        make(base=base)(tokens(2))


def test_mode_follows_the_base():
    assert not LoraMoeLinear(nn.Linear(4, 4).eval(), CONFIGS["defaults"]).training
    assert LoraMoeLinear(nn.Linear(4, 4), CONFIGS["defaults"]).training


def test_parameters_by_arithmetic():
    config = LoraMoeConfig(num_experts=4, r=[1, 2, 3, 4], top_k=2, alpha=8)
    text = repr(LoraMoeLinear(nn.Linear(10, 6), config))
    total = 10 * (10 + 6) + 4 * 10
    assert f"parameters={total:,} ({total - 3 * 16:,} per token)" in text
    assert "num_experts=4, top_k=2, r=(1, 2, 3, 4), alpha=8" in text


# --- dropout -------------------------------------------------------------------------------------


def dropout_layer():
    return make(LoraMoeConfig(num_experts=4, r=3, alpha=4, dropout=0.5))


def test_dropout_reaches_the_experts_and_not_the_router():
    layer, x = dropout_layer(), tokens(6)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    mask = nn.functional.dropout(torch.ones_like(x), 0.5).double()  # 0 or 2
    want, _ = by_loop(layer, x, mask)
    assert_accurate("y", y, want, units=8)
    assert_accurate("logits", layer.routing.logits, x.double() @ in_double(layer)[2].T, units=4)
    assert relative_error(y, by_loop(layer, x)[0]) > 0.05


def test_dropout_only_while_training():
    layer, x = dropout_layer().eval(), tokens(6)
    assert torch.equal(layer(x), layer(x))
    assert_accurate("y", layer(x), by_loop(layer, x)[0], units=8)


def test_dropout_uses_one_mask_in_forward_and_backward():
    """With the routing and the mask fixed, y is linear in x and in B: differences are exact."""
    layer, x, direction = dropout_layer(), tokens(6), tokens(6, seed=5)
    layer.given = Routing.from_ids(torch.tensor([0, 1, 2, 3, -1, 0]), num_experts=4)
    dy = torch.randn(6, D_OUT, generator=torch.Generator().manual_seed(6))

    def run(x):
        torch.manual_seed(3)
        return layer(x)

    leaf = x.clone().requires_grad_()
    run(leaf).backward(dy)
    step = torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        along_x = (run(x + direction) - run(x)).double().mul(dy).sum()
        before = run(x)
        layer.lora_B += step
        along_b = (run(x) - before).double().mul(dy).sum()
    assert float((leaf.grad * direction).sum()) == pytest.approx(float(along_x), rel=1e-4)
    assert float((layer.lora_B.grad * step).sum()) == pytest.approx(float(along_b), rel=1e-4)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters", ["narrow", "fp32"])
def test_narrow_models(dtype, adapters):
    layer = make().to(dtype)
    if adapters == "fp32":
        for name in PARAMETERS:
            layer.get_parameter(name).data = layer.get_parameter(name).data.float()
    x = tokens(8).to(dtype)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == dtype
    wide = copy.deepcopy(layer).float()
    assert_accurate("y", y, by_loop(wide, x)[0], units=4)
    for name in PARAMETERS:
        parameter = layer.get_parameter(name)
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.any()
    assert layer.routing.logits.dtype == torch.float32


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_adapters_are_fp32_or_wider(base):
    """As PEFT's, and all of them the same: FSDP2 refuses trainable parameters of mixed dtypes."""
    layer = LoraMoeLinear(nn.Linear(4, 4, dtype=base), CONFIGS["selection-bias"])
    want = {torch.float64 if base == torch.float64 else torch.float32}
    assert {layer.get_parameter(name).dtype for name in PARAMETERS} == want
    assert {layer.selection_bias.dtype, layer.scaling.dtype} == want


@pytest.mark.parametrize(
    "asked, got",
    [("base", torch.bfloat16), (torch.float16, torch.float16), ("float64", torch.float64)],
    ids=str,
)
def test_adapter_dtype_on_request(asked, got):
    config = LoraMoeConfig(num_experts=4, r=3, router_bias=True, adapter_dtype=asked)
    layer = LoraMoeLinear(nn.Linear(4, 4, dtype=torch.bfloat16), config)
    assert layer.lora_A.dtype == layer.lora_B.dtype == got
    router = torch.float64 if got == torch.float64 else torch.float32
    assert layer.router_weight.dtype == layer.router_bias.dtype == router


class KeepsItsDtype(nn.Linear):
    """A base that autocast does not reach: bitsandbytes' linears answer in x's dtype."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


@pytest.mark.parametrize("kind", [nn.Linear, KeepsItsDtype])
def test_autocast_follows_the_base(kind):
    """bf16 out where the base answers in bf16; as accurate as fp32 where it answers in fp32."""
    layer, x = make(base=kind(D_IN, D_OUT)), tokens(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    narrow = kind is nn.Linear
    assert y.dtype == (torch.bfloat16 if narrow else torch.float32)
    y.float().sum().backward()
    assert all(layer.get_parameter(name).grad.dtype == torch.float32 for name in PARAMETERS)
    if narrow:  # what autocast rounds: x and all weights but the router's
        x = x.bfloat16()
        for p in (layer.weight, layer.bias, layer.lora_A, layer.lora_B):
            p.data = p.data.bfloat16().float()
    assert_accurate("y", y, by_loop(layer, x)[0], units=4 if narrow else 8)


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_scaling_is_never_rounded(move):
    """alpha / r = 16 / 3 is no bf16 number."""
    layer = move(LoraMoeLinear(nn.Linear(8, 8), LoraMoeConfig(num_experts=2, r=3, alpha=16)))
    assert torch.equal(layer.scaling, torch.full((2,), 16 / 3))


def test_from_the_meta_device():
    layer = LoraMoeLinear(nn.Linear(D_IN, D_OUT, device="meta"), CONFIGS["unequal-ranks"])
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    assert torch.equal(layer.scaling, torch.tensor([5 / 1, 5 / 6, 5 / 2]))
    layer.load_state_dict(make(CONFIGS["unequal-ranks"]).state_dict())
    x = tokens(4)
    assert torch.equal(layer(x), make(CONFIGS["unequal-ranks"])(x))


# --- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_after_a_forward(copier):
    layer, x = make(), tokens(5)
    gates = torch.rand(5, 4, requires_grad=True) * 1.0
    layer.given = Routing.from_gates(gates)
    y = layer(x)
    twin = copier(layer)
    assert twin.routing is None and not twin.given.weights.requires_grad
    assert layer.routing is not None and layer.given.weights.requires_grad
    assert torch.equal(twin(x), y)
    twin.lora_B.data.zero_()
    assert layer.lora_B.any()


@every_config
def test_state_dict_round_trip(config):
    layer, other, x = make(config, seed=0), make(config, seed=1), tokens(5)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


# --- the routing of the last forward -------------------------------------------------------------


def test_routing_lives_for_one_step():
    layer, x = make(), tokens(5)
    layer(x).sum().backward()
    old = weakref.ref(layer.routing.weights)
    layer(x)
    assert old() is None


@pytest.mark.parametrize("rows", [6, 3], ids=["per-token", "per-sample"])
def test_given_routing(rows):
    layer, x = make(), tokens(3, 2)
    ids = torch.tensor([2, -1, 0, 1, 3, 3])[:rows]
    layer.given = Routing.from_ids(ids, num_experts=4)
    a, b, _, _ = in_double(layer)
    per_token = ids.repeat_interleave(6 // rows).tolist()
    picked = [[(e, 1.0)] if e >= 0 else [] for e in per_token]
    base = layer.base_layer(x).flatten(0, 1)
    want = base.double() + experts_by_loop(layer.config, a, b, x.double().flatten(0, 1), picked)
    y = layer(x).flatten(0, 1)
    assert_accurate("y", y, want, units=8)
    idle = torch.tensor([e < 0 for e in per_token])
    assert torch.equal(y[idle], base[idle])
    assert layer.routing.indices.flatten().tolist() == per_token


def test_a_given_routing_of_another_size_is_refused():
    layer = make()
    layer.given = Routing.from_ids(torch.zeros(2, dtype=torch.long), num_experts=4)
    with pytest.raises(ValueError, match=r"6 rows, one per token, or 3, one per sample.*got 2"):
        layer(tokens(3, 2))


def test_given_gates_receive_their_gradient():
    layer, x = make(), tokens(5)
    gates = torch.rand(5, 4, generator=torch.Generator().manual_seed(4)).requires_grad_()
    layer.given = Routing.from_gates(gates)
    layer(x).sum().backward()
    a, b, _, _ = in_double(layer)
    twin = gates.detach().double().requires_grad_()
    picked = [[(e, twin[t, e]) for e in range(4)] for t in range(5)]
    experts_by_loop(layer.config, a, b, x.double(), picked).sum().backward()
    assert_accurate("dgates", gates.grad, twin.grad, units=16)


# --- compile and checkpoint ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["defaults", "unequal-ranks", "dropout", "given"])
def test_compiles_whole_with_a_dynamic_number_of_tokens(name):
    layer = dropout_layer() if name == "dropout" else make(CONFIGS.get(name, CONFIGS["defaults"]))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    for samples in (6, 7, 9):
        if name == "given":
            layer.given = Routing.from_ids(torch.arange(samples) % 4, num_experts=4)
        results = []
        for run in (layer, compiled):
            x = tokens(samples, 3).requires_grad_()
            layer.zero_grad()
            torch.manual_seed(0)
            y = run(x)
            y.square().sum().backward()
            results.append([y, x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.routing.weights])
        for eager, traced in zip(*results, strict=True):
            assert relative_error(traced, eager) < 1e-6
    assert len(graphs) <= 2  # one for all sizes, perhaps one for the first


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["defaults", "dropout", "given"])
def test_checkpoint_gives_the_same_gradients(reentrant, name):
    layer = dropout_layer() if name == "dropout" else make()
    if name == "given":
        layer.given = Routing.from_ids(torch.tensor([3, 0]), num_experts=4)

    def gradients(run):
        x = tokens(2, 3).requires_grad_()
        layer.zero_grad()
        torch.manual_seed(0)
        run(x).square().sum().backward()
        return [x.grad, layer.lora_A.grad, layer.lora_B.grad, layer.router_weight.grad]

    plain = gradients(layer)
    saved = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    for one, other in zip(plain, saved, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recompute_leaves_no_trace(reentrant):
    """What a checkpoint recomputes must not stay alive behind `routing`, nor count twice."""
    layer, x = make(), tokens(6).requires_grad_()
    y = checkpoint(lambda x: layer(x).square(), x, use_reentrant=reentrant)  # the square saves y
    routing = layer.routing
    y.sum().backward()
    assert layer.routing is routing
    assert int(routing.counts.sum()) == 6 * 2


def test_resuming_continues_bit_for_bit(tmp_path):
    """Twenty steps, or ten, a checkpoint on disk and ten more: the same weights and moments."""
    config = LoraMoeConfig(num_experts=4, r=2, top_k=2)
    x = torch.randn(24, 12, generator=torch.Generator().manual_seed(1))

    def fresh():
        torch.manual_seed(0)
        layer = LoraMoeLinear(nn.Linear(12, 8), config)
        return layer, torch.optim.AdamW(layer.parameters(), lr=1e-2)

    def train(layer, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (layer(x) - x[:, :8]).square().mean().backward()
            optimizer.step()

    whole, optimizer = fresh()
    train(whole, optimizer, 20)
    half, optimizer = fresh()
    train(half, optimizer, 10)
    torch.save([half.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    resumed, optimizer = fresh()
    weights, moments = torch.load(tmp_path / "checkpoint.pt")
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    train(resumed, optimizer, 10)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
