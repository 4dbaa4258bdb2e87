"""Invalid arguments raise before any computation; the message names the argument and its value."""

import math

import pytest
import torch

from lora_moe import Routing, backend_info
from lora_moe import functional as F

T, E, K, R, D_IN, D_OUT = 5, 4, 2, 12, 6, 7
X = torch.randn(T, D_IN)
GOOD = {
    "x": X,
    "router_weight": torch.randn(E, D_IN),
    "lora_A": torch.randn(R, D_IN),
    "lora_B": torch.randn(R, D_OUT),
    "top_k": K,
    "rank_offsets": 3,
}

FLOAT_OFFSETS = [0.0, 3, 6, 9, 12]
WRONG_VALUES = {
    "top_k": [0, -1, E + 1, True, 1.0, None],
    "rank_offsets": [0, -3, True, 2.0, "3", FLOAT_OFFSETS]
    + [[0, 3, 6, 9], [0, 3, 3, 9, 12], [1, 4, 7, 9, 12]],
    "gate": ["Softmax", "relu", None],
    "scaling": [math.nan, math.inf, [1.0, 2.0], [1.0, 2.0, math.nan, 1.0]]
    + [True, "1", torch.ones(3)],
    "lora_A": [torch.randn(s) for s in ((D_IN, R), (R, D_IN + 1), (R - 1, D_IN), (R,))]
    + [torch.ones(R, D_IN, dtype=torch.int32), torch.randn(R, D_IN).to_sparse(), None]
    + [torch.randn(R, D_IN, device="meta")],
    "lora_B": [torch.randn(D_OUT, R), torch.randn(R + 1, D_OUT)]
    + [torch.randn(R, D_OUT, dtype=torch.complex64)],
    "router_weight": [torch.randn(E, D_IN - 1), torch.randn(D_IN, E)]
    + [torch.ones(E, D_IN, dtype=torch.bool)],
    "base": [torch.randn(T, D_OUT + 1), torch.randn(1, D_OUT), torch.randn(T, D_OUT).double()],
    "bias": [torch.randn(E + 1), torch.randn(E, 1)],
    "router_bias": [torch.randn(E - 1), torch.randn(1, E), torch.ones(E, dtype=torch.int64), 0.5]
    + [torch.randn(E, device="meta"), torch.randn(E, dtype=torch.complex64)],
    "frozen": [(E,), (-1,), (1.0,)],
    "x": [torch.ones(T, D_IN, dtype=torch.int64), torch.randn(T, D_IN).to_sparse()]
    + [torch.randn(()), torch.randn(T, D_IN, dtype=torch.complex64), None],
}
WRONG = [(name, value) for name, values in WRONG_VALUES.items() for value in values]


def test_the_valid_arguments_are_accepted():
    y, _ = F.routed_lora(**GOOD)
    assert y.shape == (T, D_OUT)


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_routed_lora_names_the_wrong_argument(index):
    name, value = WRONG[index]
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: .*(expected|takes).*got"):
        F.routed_lora(**{**GOOD, name: value})


def test_shapes_of_both_sides_are_stated():
    with pytest.raises(ValueError, match=r"lora_B: expected \(12, 7\).*got \(7, 7\)"):
        F.routed_lora(**{**GOOD, "lora_B": torch.randn(7, 7)})


def test_shared_a_requires_equal_ranks_and_r_rows():
    with pytest.raises(ValueError, match="rank_offsets: expected equal ranks"):
        F.routed_lora(**{**GOOD, "rank_offsets": [0, 2, 6, 9, 12]}, shared_a=True)
    with pytest.raises(ValueError, match=r"lora_A: expected \(3, 6\)"):
        F.routed_lora(**GOOD, shared_a=True)


def grouped(chosen, **change):
    routing = Routing.from_ids(chosen, num_experts=E)
    return F.grouped_lora(X, GOOD["lora_A"], GOOD["lora_B"], routing, rank_offsets=3, **change)


@pytest.mark.parametrize("bad", [E, -2, -(2**31), 2**31 + 1, 2**40])
def test_ids_out_of_range_raise_on_a_cpu(bad):
    wrong = torch.zeros(T, K, dtype=torch.int64)
    wrong[3, 1] = bad
    with pytest.raises(ValueError, match=rf"indices: expected expert ids in \[-1, {E}\)"):
        grouped(wrong)


def test_routing_must_fit_the_tokens():
    with pytest.raises(ValueError, match=r"routing\.indices: expected"):
        grouped(torch.zeros(T + 1, K, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"routing: expected a lora_moe\.Routing, got Tensor"):
        F.grouped_lora(X, GOOD["lora_A"], GOOD["lora_B"], torch.zeros(T, K), rank_offsets=3)


def ids(*values):
    return torch.tensor(values, dtype=torch.int32)


OTHER = [
    (lambda: Routing.from_ids(torch.zeros(3), num_experts=4), TypeError, "indices: expected"),
    (lambda: Routing.from_ids(ids([[1]]), num_experts=4), ValueError, "indices: expected"),
    (lambda: Routing.from_ids(ids(1), torch.ones(3), num_experts=4), ValueError, "weights: exp"),
    (lambda: Routing.from_ids(ids(1), num_experts=0), ValueError, "num_experts: expected"),
    (lambda: Routing.from_ids(ids(1), num_experts=2).repeat(-1), ValueError, "n: expected"),
    (lambda: Routing.from_gates(torch.ones(3)), ValueError, "gates: expected"),
    (lambda: Routing.from_gates(torch.ones(3, 2).int()), ValueError, "gates: expected"),
    (lambda: F.expand(torch.ones(3, 2), torch.ones(3, 4)), ValueError, "lora_B: expected"),
    (lambda: F.expand(*map(torch.ones, [(3, 2), (2, 4), (3, 5)])), ValueError, "base: expected"),
    (lambda: F.shrink(torch.ones(3, 2), torch.ones(4, 3)), ValueError, "lora_A: expected"),
    (lambda: Routing.from_logits(ids(1), 1), TypeError, "logits: expected a dense floating"),
    (lambda: Routing.from_logits([[1.0]], 1), TypeError, "logits: expected a tensor, got list"),
    (lambda: Routing.from_logits(X.to_sparse(), 1), TypeError, "logits: expected a dense"),
    (lambda: Routing.from_logits(X.sum(), 1), ValueError, "logits: expected .*scalar"),
    (lambda: Routing.from_logits(X, D_IN + 1), ValueError, r"top_k: expected .*\[1, 6\]"),
    (lambda: Routing.from_logits(X, 2, gate="relu"), ValueError, "gate: expected"),
    (lambda: Routing.from_logits(X, 2, bias=X[0, :2]), ValueError, r"bias: expected \(6,\)"),
    (lambda: Routing.from_logits(X, 2, bias=X[0].to("meta")), ValueError, "bias: .*like logits"),
    (lambda: Routing.from_logits(X, 2, top_p=2.0), ValueError, "top_p: expected"),
    (lambda: F.router_topk(X, torch.ones(E, D_IN), E + 1), ValueError, "top_k: expected"),
]


@pytest.mark.parametrize("call, error, message", OTHER)
def test_other_functions(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(backend_info()["serving"]["cpu"] != "triton", reason="Triton's own limit")
def test_triton_refuses_double():
    with pytest.raises((TypeError, RuntimeError), match="float64"):
        F.routed_lora(
            **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in GOOD.items()}
        )
