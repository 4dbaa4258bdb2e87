"""The fast path of decoding: when it runs, that it equals the normal path and skips no check."""

from __future__ import annotations

import contextlib
import sys
from unittest import mock

import pytest
import torch

from lora_moe import backend_info, fast_path
from lora_moe import functional as F

from ..support.cases import BY_NAME, sample, some_cases
from ..support.functions import experts_of

pytestmark = pytest.mark.skipif(
    backend_info()["serving"]["cpu"] != "cpp", reason="leads to the C++ operators"
)


@contextlib.contextmanager
def counted():
    """A list with True for each call that the fast path served and False for each that it passed on."""
    given, at_once = [], fast_path.routed_lora

    def counting(*args):
        result = at_once(*args)
        given.append(result is not None)
        return result

    with mock.patch.object(fast_path, "routed_lora", counting):
        yield given


def call(v, case, **more):
    args = (v[k] for k in ("x", "router_weight", "lora_A", "lora_B"))
    rest = {k: v[k] for k in ("scaling", "base", "bias", "router_bias")}
    return F.routed_lora(*args, case.K, **{**rest, **experts_of(case), **case.options, **more})


def long_way(v, case, **more):
    with mock.patch.object(fast_path, "routed_lora", lambda *args: None):
        return call(v, case, **more)


def same(got, want):
    (y, routing), (y2, routing2) = got, want
    return torch.equal(y, y2) and all(map(torch.equal, routing, routing2))


OPTIONS = [{}, {"threshold": 0.2}, {"top_p": 0.5, "gate": "softmax"}, {"frozen": (0, 1)}]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@some_cases("odd", "one token", "tiles fit", "unequal ranks", "shared A", "no rows")
def test_it_runs_and_equals_the_normal_path(case, dtype, options):
    v = sample(case, dtype)
    with counted() as given:
        got = call(v, case, **options)
        batch = {k: v[k] if v[k] is None else v[k][:, None] for k in ("x", "base")}
        y, _ = call({**v, **batch}, case, **options)
        if isinstance(case.ranks, int):
            equal = call(v, case, **{**options, "rank_offsets": case.ranks})
            assert same(equal, got)
    assert set(given) == {True}
    want = long_way(v, case, **options)
    assert same(got, want)
    assert torch.equal(y[:, 0], want[0])


@torch.no_grad()
def test_numbers_as_scaling():
    case, v = BY_NAME["odd"], sample(BY_NAME["odd"])
    for scaling in (2, 0.5, [1.0, 2.0, 3.0]):
        with counted() as given:
            got = call({**v, "scaling": scaling}, case)
        assert given == [True]
        assert same(got, long_way({**v, "scaling": scaling}, case))


def spread(t):
    """The same numbers with a column stride of 2."""
    return torch.stack([t, t], -1)[..., 0]


@torch.no_grad()
@pytest.mark.parametrize(
    "name, change",
    [
        *((name, spread) for name in ("x", "router_weight", "lora_A", "lora_B", "base")),
        *((name, spread) for name in ("bias", "router_bias", "scaling")),
        *((name, torch.Tensor.double) for name in ("scaling", "bias", "router_bias")),
        ("x", lambda t: spread(t).view(3, 11, -1).transpose(0, 1).contiguous().transpose(0, 1)),
    ],
)
def test_operands_that_need_a_copy_take_the_normal_path(name, change):
    """The operator refuses them with a ValueError, which never reaches the caller."""
    case, v = BY_NAME["unequal ranks"], sample(BY_NAME["unequal ranks"])
    want = call(v, case)[0]
    v[name] = change(v[name])
    if v["x"].dim() == 3:
        v["base"] = v["base"].view(3, 11, -1)
    with counted() as given:
        y, _ = call(v, case)
    assert len(given) == 1
    assert torch.equal(y.reshape(want.shape), want)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, ZeroDivisionError, AttributeError])
@torch.no_grad()
def test_other_errors_propagate_without_a_retry(error):
    case, v = BY_NAME["odd"], sample(BY_NAME["odd"])
    calls = []

    def failing(*args):
        calls.append(args)
        raise error("of the operator")

    operator = mock.Mock(default=failing, side_effect=failing)
    with (
        mock.patch.object(fast_path, "_ops", mock.Mock(routed_lora=operator)),
        pytest.raises(error, match="of the operator"),
    ):
        call(v, case)
    assert len(calls) == 1


WRONG = {
    "x": [
        torch.randn(7, 15, device="meta"),
        torch.randn(7, 15).to_sparse(),
        torch.randn(2, 7, 15).to_sparse(),
        torch.randn(()),
        None,
        [[1.0]],
    ],
    "router_weight": [
        torch.randn(3, 15, device="meta"),
        torch.randn(3, 15).to_sparse(),
        torch.randn(()),
        None,
    ],  # fmt: skip,
    "lora_A": [torch.randn(9, 15, device="meta"), torch.randn(9, 15).to_sparse_csr(), None, 3],
    "lora_B": [torch.randn(9, 17, device="meta"), torch.randn(9, 17).to_mkldnn(), "B"],
    "base": [torch.randn(7, 17, device="meta"), torch.randn(7, 17).to_sparse(), 1.0],
    "router_bias": [torch.randn(3, device="meta"), torch.randn(3).to_sparse(), [0.0] * 3],
    "scaling": [torch.randn(3, device="meta"), torch.randn(3).to_sparse(), "1", None],
    "bias": [torch.randn(3, device="meta"), torch.randn(3).to_sparse(), (0.0, 0.0, 0.0)],
    "rank_offsets": [[0, 3.0, 6, 9], [0, 3, 3, 9], [0, 1 << 70, 6, 9], ["0"] * 4, None, 0],
    "top_k": [0, 4, True, 2.0, "2", 1 << 70],
    "gate": ["Softmax", None, 0],
    "frozen": [(3,), 1, ("0",), torch.tensor([0, 1])],
    "top_p": [0.0, 2.0, "0.5"],
    "threshold": [-1.0, "a"],
    "base_weight": [torch.randn(17, 14), torch.randn(17, 15, dtype=torch.float64)],
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "name, value",
    [
        pytest.param(name, value, id=f"{name}-{i}")
        for name, values in WRONG.items()
        for i, value in enumerate(values)
    ],
)
def test_it_checks_what_the_public_function_checks(name, value, grad):
    case, v = BY_NAME["odd"], sample(BY_NAME["odd"])
    v["bias"] = torch.rand(3)
    names = ("x", "router_weight", "lora_A", "lora_B", "scaling", "base", "bias", "router_bias")
    args = {k: v[k] for k in names} | {"top_k": case.K, "gate": "softmax", **experts_of(case)}
    with torch.set_grad_enabled(grad):
        F.routed_lora(**args)
        other = (
            "router_weight" if name == "x" else name
        )  # x alone may be on meta, and then the others do not match it
        with pytest.raises(
            (ValueError, TypeError), match=rf"^({name}|{other}): .*(expected|takes)"
        ):
            F.routed_lora(**{**args, name: value})


@pytest.mark.parametrize("where", ["grad", "autocast", "compile", "meta"])
def test_it_is_not_taken_elsewhere(where):
    case, v = BY_NAME["odd"], sample(BY_NAME["odd"])
    with counted() as given, torch.set_grad_enabled(where == "grad"):
        if where == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                call({**v, "base": v["base"].bfloat16()}, case)
        elif where == "meta":
            y, routing = call({k: t if t is None else t.to("meta") for k, t in v.items()}, case)
            assert y.device.type == routing.indices.device.type == "meta"
        elif where == "compile":
            torch._dynamo.reset()
            torch.compile(lambda v: call(v, case)[0], backend="eager", fullgraph=True)(v)
        else:
            call(v, case)
    assert True not in given


@torch.no_grad()
def test_a_decoding_step_makes_few_python_calls():
    """Counts Python calls: 210 layers make them for each token."""
    case, v = BY_NAME["one token"], sample(BY_NAME["one token"])
    x, base = v["x"][None], v["base"][None]  # (1, 1, D), as in generate
    args = (x, v["router_weight"], v["lora_A"], v["lora_B"], case.K)
    rest = {
        "rank_offsets": case.offsets, "scaling": v["scaling"], "base": base, "gate": "softmax",
        "renormalize": True, "bias": None, "shared_a": False, "frozen": (),
    }  # fmt: skip
    F.routed_lora(*args, **rest)
    calls = []

    def profile(frame, event, arg):
        if event == "call":
            calls.append(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        F.routed_lora(*args, **rest)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 8, calls
