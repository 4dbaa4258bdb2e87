"""The frozen base's part of dx is added within its product only if the base is a plain linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_moe import LoraMoeConfig, LoraMoeLinear, Routing, base_backward, disable_adapters
from lora_moe import functional as F

T, D_IN, D_OUT = 19, 24, 40


@pytest.fixture(autouse=True)
def every_backend(monkeypatch):
    monkeypatch.setattr(base_backward, "BACKENDS", {"cpp", "reference", "triton", "cuda"})


def new_layer(dtype=torch.float32, bias=True, **config):
    torch.manual_seed(0)
    base = torch.nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype).requires_grad_(False)
    options = {"num_experts": 4, "r": 4, "top_k": 2, "adapter_dtype": "base"} | config
    layer = LoraMoeLinear(base, LoraMoeConfig(**options))
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.3)
    return layer


def tokens(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(T, D_IN, dtype=dtype).requires_grad_(), torch.randn(T, D_OUT, dtype=dtype)


def gradients(layer, x, dy, run=None):
    """y, then dx and the gradient of each trainable parameter."""
    y = layer(x) if run is None else run(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return y, *torch.autograd.grad(y, [x, *trained], dy)


def pytorchs_way(layer):
    """The same layer with a base of another class: autograd adds its part of dx."""
    other = copy.deepcopy(layer)
    other.base_layer.__class__ = type("Another", (torch.nn.Linear,), {})
    assert (
        base_backward.base_weight(other.base_layer, torch.zeros(1, D_IN, requires_grad=True))
        is None
    )
    return other


def taken(layer, x):
    return base_backward.base_weight(layer.base_layer, x) is not None


def additions(y, x):
    """The number of gradients that autograd adds at x."""
    found, todo = 0, [y.grad_fn]
    while todo:
        node = todo.pop()
        for after, _ in node.next_functions:
            if after is not None:
                found += getattr(after, "variable", None) is x
                todo.append(after)
    return found


@pytest.mark.parametrize("given", [False, True], ids=["routed", "given"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_fp64(given, bias):
    layer, (x, dy) = new_layer(bias=bias), tokens()
    ids = torch.randint(0, 4, (T, 2), generator=torch.Generator().manual_seed(2))
    decision = Routing.from_ids(ids, num_experts=4)
    truth = copy.deepcopy(layer).double()

    def run(of):
        if not given:
            return of
        return lambda v: of.add_experts(v, of.base_layer(v), decision)[0]

    assert taken(layer, x)
    layer.routing_override = decision if given else None
    got = gradients(layer, x, dy)
    double = x.detach().double().requires_grad_()
    y = run(truth)(double)
    trained = [p for p in truth.parameters() if p.requires_grad]
    want = y, *torch.autograd.grad(y, [double, *trained], dy.double(), allow_unused=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w.float())


def test_one_gradient_meets_at_x():
    layer, (x, _) = new_layer(), tokens()
    assert additions(layer(x), x) == 1
    assert additions(pytorchs_way(layer)(x), x) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dx_errs_at_most_as_much_as_the_sum_by_autograd(dtype):
    layer, (x, dy) = new_layer(dtype), tokens(dtype)
    truth = copy.deepcopy(layer).double()
    with torch.no_grad():
        ids, weights = layer_routing(layer, x)
    decision = Routing.from_ids(ids, weights, num_experts=4)
    double = x.detach().double().requires_grad_()
    y = F.grouped_lora(
        double, truth.lora_A, truth.lora_B, decision, rank_offsets=4, scaling=truth.scaling,
        base=truth.base_layer(double),
    )  # fmt: skip
    (exact,) = torch.autograd.grad(y, [double], dy.double())
    errors = []
    for way in (layer, pytorchs_way(layer)):
        way.routing_override = decision
        _, dx, *_ = gradients(way, x, dy)
        errors.append((dx.double() - exact).square().mean().sqrt())
    assert errors[0] <= 1.05 * errors[1] + 1e-9


def layer_routing(layer, x):
    layer(x)
    return layer.routing.indices, layer.routing.weights


def test_used_twice_and_in_a_checkpoint():
    layer, (x, dy) = new_layer(), tokens()
    for run in (
        lambda of: lambda v: of(v) + of(2 * v),
        lambda of: lambda v: checkpoint(of, v, use_reentrant=False),
        lambda of: lambda v: checkpoint(of, v, use_reentrant=True),
        lambda of: lambda v: of(v.view(1, T, D_IN)).view(T, D_OUT),
    ):
        got, want = (
            gradients_by_backward(of, x, dy, run(of)) for of in (layer, pytorchs_way(layer))
        )
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)


def gradients_by_backward(layer, x, dy, run):
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for p in trained:
        p.grad = None
    run(x).backward(dy)
    return [p.grad.clone() for p in trained]


def test_only_the_routing_reaches_the_loss():
    layer, (x, _) = new_layer(), tokens()
    grads = []
    for way in (layer, pytorchs_way(layer)):
        way(x)
        grads.append(torch.autograd.grad(way.routing.weights.square().sum(), [x])[0])
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 0


def test_with_adapters_disabled_the_base_has_its_graph():
    layer, (x, dy) = new_layer(), tokens()
    model = torch.nn.Sequential(layer)
    with disable_adapters(model):
        (dx,) = torch.autograd.grad(model(x), [x], dy)
    torch.testing.assert_close(dx, dy @ layer.base_layer.weight)


def test_compiled_with_fullgraph():
    layer, (x, dy) = new_layer(), tokens()
    want = gradients(layer, x, dy)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for g, w in zip(gradients(layer, x, dy, compiled), want, strict=True):
        torch.testing.assert_close(g, w)


def weight_trains(layer, x):
    layer.base_layer.weight.requires_grad_()


def bias_trains(layer, x):
    layer.base_layer.bias.requires_grad_()


def forward_hook(layer, x):
    layer.base_layer.register_forward_hook(lambda *args: None)


def forward_pre_hook(layer, x):
    layer.base_layer.register_forward_pre_hook(lambda *args: None)


def backward_hook(layer, x):
    layer.base_layer.register_full_backward_hook(lambda *args: None)


def backward_pre_hook(layer, x):
    layer.base_layer.register_full_backward_pre_hook(lambda *args: None)


def own_forward(layer, x):
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda v: forward(v)


def parametrized(layer, x):
    identity = torch.nn.Identity()
    torch.nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", identity)


def subclass_of_tensor(layer, x):
    class Quantized(torch.Tensor):
        pass

    weight = layer.base_layer.weight.detach().as_subclass(Quantized)
    layer.base_layer.weight = torch.nn.Parameter(weight, requires_grad=False)


def no_gradient_of_x(layer, x):
    x.requires_grad_(False)


CHANGES = [
    weight_trains, bias_trains, forward_hook, forward_pre_hook, backward_hook, backward_pre_hook,
    own_forward, parametrized, subclass_of_tensor, no_gradient_of_x,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_any_other_base_is_left_to_autograd(change):
    layer, (x, dy) = new_layer(), tokens()
    want = gradients(layer, x, dy)
    assert taken(layer, x)
    change(layer, x)
    assert not taken(layer, x)
    torch.testing.assert_close(layer(x), want[0])
    if x.requires_grad:
        torch.testing.assert_close(torch.autograd.grad(layer(x), [x], dy)[0], want[1])


def test_autocast_and_global_hooks_are_left_to_autograd():
    layer, (x, _) = new_layer(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken(layer, x)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not taken(layer, x)
    finally:
        handle.remove()
    with torch.no_grad():
        assert not taken(layer, x)
    assert taken(layer, x)


def test_dropout_of_the_experts_is_left_to_autograd():
    layer, (x, _) = new_layer(dropout=0.5), tokens()
    assert "NoneType" not in type(layer(x).grad_fn).__name__
    assert additions(layer(x), x) > 1
    assert additions(layer.eval()(x), x) == 1


@pytest.mark.parametrize(
    ("weight", "base", "expected"),
    [
        (torch.zeros(D_OUT, D_IN + 1), torch.zeros(T, D_OUT), r"base_weight: expected \(40, 24\)"),
        (torch.zeros(D_OUT, D_IN), None, "base_weight: expected None unless base"),
        (
            torch.zeros(D_OUT, D_IN).double(),
            torch.zeros(T, D_OUT),
            "expected a frozen torch.float32",
        ),
        (torch.zeros(D_OUT, D_IN).requires_grad_(), torch.zeros(T, D_OUT), "requires_grad=True"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(weight, base, expected):
    layer, (x, _) = new_layer(), tokens()
    with pytest.raises(ValueError, match=expected):
        layer_call = layer.router_weight, layer.lora_A, layer.lora_B, 2
        F.routed_lora(x, *layer_call, rank_offsets=4, base=base, base_weight=weight)
