"""The operators in PyTorch: opcheck and gradcheck on each, compile, autocast, checkpointing, threads."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lora_moe import Routing
from lora_moe import functional as F
from lora_moe.ops import SCHEMAS

from ..support.cases import BY_NAME, leaves, sample, some_cases
from ..support.functions import BACKEND, PARAMETERS, experts_of, routed
from ..support.operators import PLAN, PLANS, operator_calls, ops

no_double = pytest.mark.skipif(BACKEND == "triton", reason="Triton kernels have no float64")


@pytest.mark.parametrize("name", operator_calls(BY_NAME["odd"]))
@pytest.mark.parametrize("plan", PLANS)
@some_cases("odd", "unequal ranks", "shared A", "no rows")
def test_opcheck(name, case, plan):
    if plan != PLAN and "lora" not in name:
        pytest.skip("takes no plan")
    for args in operator_calls(case, plan=plan)[name]:
        torch.library.opcheck(
            getattr(ops, name).default,
            args,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_every_operator_is_checked():
    assert set(operator_calls(BY_NAME["odd"])) == set(SCHEMAS)


@no_double
@some_cases("odd", "unequal ranks", "shared A", "dense")
def test_gradcheck(case):
    if case.T * case.R > 300:  # gradcheck runs the function once per input number
        case = type(case)(**{**vars(case), "T": 3})
    v = leaves(sample(case, torch.float64), *PARAMETERS)
    names = [n for n in PARAMETERS if v[n] is not None]

    def function(*tensors):
        y, routing = routed({**v, **dict(zip(names, tensors, strict=True))}, case)
        return y, routing.weights, routing.logits, routing.mean_prob, routing.lse

    assert torch.autograd.gradcheck(function, [v[n] for n in names], nondet_tol=0)


@no_double
def test_gradcheck_of_the_other_functions():
    case = BY_NAME["odd"]
    v = leaves(sample(case, torch.float64), *PARAMETERS)
    x, w, a, b, base = (v[k] for k in PARAMETERS[:5])
    ids = torch.tensor([[0, 1], [2, 2], [-1, 1], [-1, -1], [1, 0], [2, 0], [0, -1]])
    weights = torch.rand(ids.shape, dtype=torch.float64, requires_grad=True)

    def grouped(x, a, b, base, weights):
        routing = Routing.from_ids(ids, weights, num_experts=case.E)
        return F.grouped_lora(x, a, b, routing, base=base, **experts_of(case))

    def router(x, w):
        return F.router_topk(x, w, 2)[1::2] + F.router_topk(x, w, 2, gate="sigmoid")[4:]

    def floats(function):
        return lambda *args: tuple(
            t for t in function(*args) if t is not None and t.is_floating_point()
        )

    check = functools.partial(torch.autograd.gradcheck, nondet_tol=0)
    assert check(grouped, (x, a, b, base, weights))
    assert check(floats(router), (x, w))
    assert check(lambda x, a, w: F.shrink(x, a, w), (x, a, w))
    assert check(
        lambda h, b, base: F.expand(h, b, base),
        (F.shrink(x, a)[0].detach().requires_grad_(), b, base),
    )


def test_compile_fullgraph_and_dynamic_tokens():
    case = BY_NAME["tiles fit"]
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    def step(v):
        y, routing = routed(v, case)
        return y.square().mean() + routing.lse.square().mean() + routing.mean_prob.square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
    names = [n for n in PARAMETERS if sample(case)[n] is not None]
    # all in one size class, as the plan may differ between classes; not 64, which equals R
    for rows in (63, 33, 20):
        v = sample(case)
        v = leaves({**v, "x": v["x"][:rows], "base": v["base"][:rows]}, *PARAMETERS)
        got = torch.autograd.grad(compiled(v), [v[k] for k in names])
        want = torch.autograd.grad(step(v), [v[k] for k in names])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert len(graphs) == 1, "T must not recompile"


def test_aot_autograd_traces_forward_and_backward():
    case = BY_NAME["unequal ranks"]
    torch._dynamo.reset()
    v = leaves(sample(case), *PARAMETERS)
    compiled = torch.compile(
        lambda v: routed(v, case)[0].square().sum(), fullgraph=True, backend="aot_eager"
    )
    got = torch.autograd.grad(compiled(v), [v[k] for k in PARAMETERS])
    want = torch.autograd.grad(routed(v, case)[0].square().sum(), [v[k] for k in PARAMETERS])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_takes_x_as_linear_would():
    case = BY_NAME["tiles fit"]
    v = sample(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = routed({**v, "base": v["base"].bfloat16()}, case)
        linear = torch.nn.functional.linear(v["x"], v["lora_A"])
    assert y.dtype == linear.dtype == torch.bfloat16
    half = {k: t.bfloat16() if k in ("x", "base", "lora_A", "lora_B") else t for k, t in v.items()}
    assert torch.equal(y, routed(half, case)[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_with_exact_ties(use_reentrant):
    case = BY_NAME["tiles fit"]

    def gradients(run):
        v = leaves(sample(case), *PARAMETERS)
        ties = torch.zeros(case.E, 1).repeat(1, case.D_in).requires_grad_()  # all logits are equal
        y = run(lambda x, w: routed({**v, "x": x, "router_weight": w}, case)[0], v["x"], ties)
        y.square().sum().backward()
        return [t.grad for t in (ties, v["x"], v["lora_A"], v["lora_B"])]

    plain = gradients(lambda f, *args: f(*args))
    again = gradients(lambda f, *args: checkpoint(f, *args, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_vmap_is_refused():
    v = sample(BY_NAME["odd"])
    w = v["router_weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: F.router_topk(x, w, 2).weights)(v["x"].expand(3, -1, -1))


@pytest.mark.skipif(BACKEND == "triton", reason="the interpreter keeps its state in one place")
def test_eight_threads_at_once():
    case = BY_NAME["long"]
    inputs = [sample(case, seed=i) for i in range(8)]
    want = [routed(v, case)[0] for v in inputs]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda v: routed(v, case)[0], inputs * 4))
    assert all(torch.equal(y, want[i % 8]) for i, y in enumerate(got))


def test_two_hundred_steps_follow_the_reference():
    """A tiny model's loss curve stays within 1e-4 of the reference in fp64."""

    def losses(dtype, run):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(32, 12, generator=g, dtype=torch.float64).to(dtype)
        target = torch.randn(32, 6, generator=g, dtype=torch.float64).to(dtype)
        shapes = {"w": (4, 12), "a": (8, 12), "b": (8, 6)}
        p = {
            k: torch.randn(s, generator=g, dtype=torch.float64).mul(0.3).to(dtype).requires_grad_()
            for k, s in shapes.items()
        }
        optimizer = torch.optim.SGD(p.values(), lr=0.5)
        curve = []
        for _ in range(200):
            loss = (run(x, p) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return torch.tensor(curve)

    def ours(x, p):
        return F.routed_lora(x, p["w"], p["a"], p["b"], 4, rank_offsets=2)[0]

    def plain(x, p):
        gate = torch.softmax(x @ p["w"].T, -1).repeat_interleave(2, 1)
        return ((x @ p["a"].T) * gate) @ p["b"]

    got, want = losses(torch.float32, ours), losses(torch.float64, plain)
    assert want[-1] < 0.7 * want[0]
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=0)
