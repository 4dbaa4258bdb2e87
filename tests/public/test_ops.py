"""The operators within PyTorch: opcheck on each, gradcheck, compile, autocast, checkpointing, threads."""

from __future__ import annotations

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lora_moe import Routing, backend, backend_info, plan, reference
from lora_moe import functional as F
from lora_moe.ops import SCHEMAS, VERSION

from ..support import on_device
from ..support.cases import BY_NAME, leaves, sample, some_cases
from .test_functional import BACKEND, PARAMETERS, experts_of, routed

ops = torch.ops.lora_moe
PLANS = plan.BACKENDS[BACKEND]
PLAN = PLANS[0]
SLOTS_PLAN = "segmented" if "segmented" in PLANS else PLAN
no_double = pytest.mark.skipif(BACKEND == "triton", reason="Triton kernels have no float64")


def operator_calls(case, dtype=torch.float32, plan=PLAN):
    """Arguments for every operator, as the autograd.Functions would pass them."""
    v = sample(case, dtype)
    x, w, a, b = (v[k] for k in ("x", "router_weight", "lora_A", "lora_B"))
    router = (case.K, case.gate, case.renormalize, reference.ALL_KEPT, 0.0)
    experts = (v["scaling"], case.offsets, case.shared_a)
    forward = (x, w, a, b, v["base"], v["bias"], v["router_bias"], *experts, *router, plan)
    y, indices, weights, logits, mean_prob, lse, _, s = ops.routed_lora(*forward)
    saved = (x, a, b, s, indices, weights)
    aux = tuple(torch.ones_like(t) for t in (weights, logits, mean_prob, lse))
    dy = torch.ones_like(y)
    needs = ([0], True, True, True, True, plan)
    partial = ([], True, False, False, True, plan)
    apart = () if case.shared_a or plan != SLOTS_PLAN else ("apart", "sum")
    every, every_dy = (t.repeat_interleave(case.K, 0) for t in (x, dy))  # a row per slot
    return {
        "router_topk": [(x, w, v["bias"], v["router_bias"], *router)],
        "route_logits": [(logits, v["bias"], *router)],
        "router_topk_backward": [
            (*aux, indices, weights, logits, *router[1:3]),
            (None, None, None, aux[3], indices, weights, logits, *router[1:3]),
        ],
        "shrink": [(x, a, w), (x, a, None)],
        "expand": [
            (logits, w, None, None, None, dtype),
            (logits, w, logits, w, x, dtype),
        ],
        "gram": [(logits, x)],
        "grouped_lora": [
            (x, a, b, v["base"], indices, weights, *experts, "none", plan),
            *(
                (every if slots == "sum" else x, a, b, None, indices, weights, *experts, slots, plan)
                for slots in apart
            ),
        ],
        "grouped_lora_backward": [
            (dy, *saved, *experts, "none", *needs),
            (dy, *saved, *experts, "none", *partial),
            *(
                (every_dy, *saved, *experts, slots, *needs) if slots == "apart"
                else (dy, every, *saved[1:], *experts, slots, *needs)
                for slots in apart
            ),
        ],
        "routed_lora": [forward, (*forward[:4], None, None, None, *forward[7:])],
        "routed_lora_banks": [banks_call(v, case, experts, router, plan)],
        "routed_lora_backward": [
            (dy, *more, x, w, a, b, s, indices, weights, logits, *experts, *router[1:3], *need[:5],
             more is aux, plan)
            for more, need in ((aux, needs), ((None,) * 4, partial))
        ],
    }  # fmt: skip


def banks_call(v, case, experts, router, plan):
    """Two banks of one layer's operands, the second columns further on."""
    scaling, offsets, shared_a = experts
    twice = [[v[k]] * 2 for k in ("router_weight", "lora_A", "lora_B")]
    base = torch.cat([v["x"].new_ones(case.T, 2 * case.D_out + 1)], 1)
    biases = [[v[k]] * 2 for k in ("bias", "router_bias")]
    starts = [0, case.D_out + 1]
    return v["x"], *twice, base, *biases, [scaling] * 2, offsets, shared_a, starts, *router, plan


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
    if case.T * case.R > 300:  # gradcheck runs the function once per number
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
    # of one size class, as the plan may change with it; not 64, which would stand for R as well
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
        ties = torch.zeros(case.E, 1).repeat(1, case.D_in).requires_grad_()  # every logit is equal
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
    """A tiny model's loss curve, within 1e-4 of the reference's mathematics in fp64."""

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


@pytest.mark.skipif(backend_info()["serving"]["cpu"] != "cpp", reason="of the C++ backend")
def test_the_cpp_operators_check_their_own_arguments():
    """A caller of the bare operator cannot make it read out of bounds."""
    good = operator_calls(BY_NAME["odd"])["routed_lora"][0]
    with pytest.raises(ValueError, match="offsets: expected ascending rows"):
        ops.routed_lora(*good[:8], [0, 6, 3, 9], *good[9:])
    with pytest.raises(ValueError, match="lora_B: expected shape"):
        ops.routed_lora(*good[:2], torch.randn(12, 15), *good[3:8], [0, 3, 6, 12], *good[9:])
    with pytest.raises(ValueError, match="plan"):
        ops.routed_lora(*good[:-1], "rank_dense")
    with pytest.raises(ValueError, match="lora_A: expected float32, got float64"):
        ops.shrink(torch.ones(2, 3), torch.ones(2, 3).double(), None)
    with pytest.raises(ValueError, match=r"x: expected float32, .*got int64"):
        ops.shrink(torch.ones(2, 3).long(), torch.ones(2, 3), None)
    with pytest.raises(ValueError, match="lora_A: expected unit stride along columns, got 2"):
        ops.shrink(torch.ones(2, 3), torch.ones(3, 2).T, None)
    aux, rest = [torch.ones(2, 2).T.expand(4, 2, 2)[0], None, None, None], (
        torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2), torch.ones(2, 3), "softmax", True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="dweights: expected a contiguous tensor"):
        ops.router_topk_backward(*aux, *rest)


def mixed_calls():
    """Every tensor of every operator's call in turn on another device, then sparse."""
    for name, calls in operator_calls(BY_NAME["unequal ranks"]).items():
        for i, value in enumerate(calls[0]):
            if isinstance(value, torch.Tensor):
                yield (
                    name,
                    i,
                    value.to("meta"),
                    (ValueError, "expected device (cpu|meta) like .*got"),
                )
                yield (
                    name,
                    i,
                    value.to_sparse(),
                    (TypeError, "expected a dense tensor, got a .*sparse"),
                )


MIXED = list(mixed_calls())


@pytest.mark.parametrize("index", range(len(MIXED)))
def test_operands_of_two_kinds_reach_no_kernel(index):
    """Whoever calls: a kernel's fake would answer with memory that nobody wrote."""
    name, i, value, (error, message) = MIXED[index]
    args = list(operator_calls(BY_NAME["unequal ranks"])[name][0])
    args[i] = value
    with pytest.raises(error, match=message):
        getattr(ops, name)(*args)


@pytest.mark.parametrize("name", operator_calls(BY_NAME["unequal ranks"]))
def test_operands_of_two_devices_are_refused_while_tracing(name):
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        args = [
            mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for v in operator_calls(BY_NAME["unequal ranks"])[name][0]
        ]
        getattr(ops, name)(*args)
        last = max(i for i, v in enumerate(args) if isinstance(v, torch.Tensor))
        args[last] = torch.empty(args[last].shape, dtype=args[last].dtype, device="cuda")
        with pytest.raises(ValueError, match=r"expected device cpu like .*, got cuda"):
            getattr(ops, name)(*args)


@pytest.mark.parametrize("name", operator_calls(BY_NAME["unequal ranks"]))
def test_a_call_on_meta_gives_the_shapes(name):
    args = operator_calls(BY_NAME["unequal ranks"])[name][0]
    want = getattr(ops, name)(*args)
    got = getattr(ops, name)(*on_device.moved(args, "meta"))
    pairs = zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (got, want)), strict=True)
    for a, b in pairs:
        assert a.device.type == "meta" and (a.shape, a.dtype) == (b.shape, b.dtype)


def test_extensions_are_built_for_this_version_of_the_schemas():
    """A schema that changes takes its number along: nothing else keeps an old build from misreading it."""
    digest = hashlib.sha256(repr(sorted(SCHEMAS.items())).encode()).hexdigest()[:12]
    assert (VERSION, digest) == (4, "eecc2693ad7b")
    header = Path(__file__).parents[2] / "csrc/tensors.h"
    assert f"kOperators = {VERSION};" in header.read_text()


class Extension:
    """What backend.py sees of one."""

    def __init__(self, **facts):
        self.build_info = lambda: facts
        self.register_operators = lambda: pytest.fail("registered")


def test_an_extension_for_other_schemas_is_refused():
    old = [Extension(), Extension(operators=VERSION - 1), Extension(operators=VERSION + 1)]
    for extension in old:
        with pytest.raises(
            backend.BackendUnavailable, match=r"built for operators of version .*build it again"
        ):
            backend._built_for_these_operators(extension)
    assert backend._built_for_these_operators(Extension(operators=VERSION)) == {
        "operators": VERSION
    }
