"""Second derivatives, forward mode and torch.func: each works or raises a clear error."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from lora_moe import LoraMoeConfig, LoraMoeLinear, reference

from ..support.cases import BY_NAME, leaves, sample
from ..support.functions import (
    USED,
    every_function,
    inputs_of,
    routed,
)

CASE = BY_NAME["unequal ranks"]


def outputs_of(function, v):
    outputs, _ = function(v, CASE)
    return sum(o.square().sum() for o in outputs)


@every_function
@pytest.mark.parametrize("allow_unused", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_second_derivatives_raise(function, allow_unused, squared):
    """Even if the incoming gradient needs no gradient, as in y.sum(), where PyTorch's own check is silent."""
    v = leaves(inputs_of(CASE, torch.float32), *USED[function])
    names = [n for n in USED[function] if v[n] is not None and n != "base"]
    outputs, _ = function(v, CASE)
    loss = sum((o.square() if squared else o).sum() for o in outputs)
    grads = torch.autograd.grad(loss, [v[n] for n in names], create_graph=True)
    penalty = sum(g.square().sum() for g in grads)
    for name in names:
        with pytest.raises(RuntimeError, match=r"second derivatives .*not implemented"):
            torch.autograd.grad(penalty, v[name], allow_unused=allow_unused, retain_graph=True)


@every_function
def test_create_graph_alone_changes_nothing(function):
    """create_graph=True without a second derivative gives the same bits."""
    results = []
    for create_graph in (False, True):
        v = leaves(inputs_of(CASE, torch.float32), *USED[function])
        used = [v[n] for n in USED[function] if v[n] is not None]
        results.append(
            torch.autograd.grad(outputs_of(function, v), used, create_graph=create_graph)
        )
        other = torch.ones((), requires_grad=True)  # independent of these gradients
        total = other * sum(g.detach().sum() for g in results[-1])
        assert torch.autograd.grad(total, other)[0].isfinite()
    assert all(map(torch.equal, *results))


def test_linear_terms_may_be_differentiated_again():
    """The gradient of base is that of y, whatever the other operands are."""
    v = leaves(sample(CASE), "base")
    y, _ = routed(v, CASE)
    scale = torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad((scale * y).sum(), v["base"], create_graph=True)
    assert torch.autograd.grad(grad.sum(), scale)[0] == grad.numel()


@every_function
@pytest.mark.parametrize("trainable", [False, True])
def test_forward_mode_raises(function, trainable):
    """With no trainable parameter the tangent would be dropped and the derivative silently zero."""
    name = USED[function][0]
    v = inputs_of(CASE, torch.float32)
    v = leaves(v, *USED[function][1:]) if trainable else v
    with forward_ad.dual_level():
        function(v, CASE)  # no tangent yet
        v[name] = forward_ad.make_dual(v[name], torch.ones_like(v[name]))
        with pytest.raises(RuntimeError, match=r"forward-mode derivatives .*not implemented"):
            function(v, CASE)


def transformed(transform, function, v):
    name = USED[function][0]

    def loss(t):
        return outputs_of(function, {**v, name: t})

    x = v[name]
    return {
        "grad": lambda: torch.func.grad(loss)(x),
        "vjp": lambda: torch.func.vjp(loss, x),
        "jvp": lambda: torch.func.jvp(loss, (x,), (x,)),
        "jacrev": lambda: torch.func.jacrev(loss)(x),
        "vmap": lambda: torch.func.vmap(loss)(torch.stack([x, x])),
    }[transform]()


@every_function
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "vmap"])
def test_transforms_of_torch_func_raise(function, transform):
    v = inputs_of(CASE, torch.float32)
    for no_grad in (False, True):
        refused = pytest.raises(RuntimeError, match=r"torch\.func's transforms .*not implemented")
        with torch.set_grad_enabled(not no_grad), refused:
            transformed(transform, function, v)


def test_a_transform_of_another_function_works():
    v = sample(CASE)
    y, _ = routed(v, CASE)
    got = torch.func.vmap(lambda t: t * routed(v, CASE)[0].sum())(torch.arange(3.0))
    torch.testing.assert_close(got, torch.arange(3.0) * y.sum())


def test_functional_call():
    torch.manual_seed(0)
    layer = LoraMoeLinear(nn.Linear(6, 7), LoraMoeConfig(num_experts=4, r=2, top_k=2))
    other = {n: torch.randn_like(p).requires_grad_() for n, p in layer.named_parameters()}
    x = torch.randn(3, 6)
    y = torch.func.functional_call(layer, other, (x,))
    y.square().sum().backward()
    layer.load_state_dict({n: p.detach() for n, p in other.items()}, strict=False)
    layer.requires_grad_()
    want = layer(x)
    want.square().sum().backward()
    assert torch.equal(y, want)
    for name, p in layer.named_parameters():
        assert torch.equal(p.grad, other[name].grad), name


def test_the_reference_takes_every_transform():
    """As the error messages claim."""
    v = sample(BY_NAME["odd"], torch.float64)
    rest = [v[k] for k in ("router_weight", "lora_A", "lora_B", "base")]
    case = BY_NAME["odd"]

    def loss(x):
        return reference.routed_lora(
            x, *rest, None, v["router_bias"], v["scaling"], case.offsets, False, case.K, "softmax", True
        )[0].square().sum()  # fmt: skip

    x = v["x"]
    grad = torch.func.grad(loss)(x)
    _, along = torch.func.jvp(loss, (x,), (x,))
    torch.testing.assert_close(along, (grad * x).sum())
    torch.testing.assert_close(torch.func.vmap(loss)(torch.stack([x, 2 * x]))[1], loss(2 * x))
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    torch.testing.assert_close(second, torch.func.hessian(loss)(x).sum((0, 1)))
