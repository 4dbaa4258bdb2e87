"""The benchmarks' inputs; their peers against fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import contenders as entry
from benchmarks import peers, report, suite
from benchmarks.shapes import Shape, sample

SMALL = Shape(13, 24, 16, 5, 4, 2)
DENSE = Shape(9, 24, 16, 4, 4, 4)
SINGLE = Shape(9, 24, 16, 4, 4, 1, "zipf")
FEW = Shape(2, 24, 16, 5, 4, 1)  # most experts get no token

SAME = [c for c in entry.contenders(compiled=False) if c.same]

some_shapes = pytest.mark.parametrize("shape", [SMALL, DENSE, SINGLE, FEW], ids=str)


@some_shapes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_inputs_give_the_drawn_routing(shape, dtype):
    inputs = sample(shape, dtype)
    ids, _, gate = peers.route(inputs.x, inputs.router, shape.K)
    assert torch.equal(ids.sort().values, inputs.ids.sort().values)
    assert all(len(set(row)) == shape.K for row in inputs.ids.tolist())
    assert inputs.touched == ids.unique().numel()
    assert gate.max() < 0.99  # no expert dominates the gradients


def test_zipf_is_skewed():
    shape = Shape(4000, 16, 16, 8, 4, 1, "zipf")
    counts = sample(shape, torch.float32).ids.flatten().bincount(minlength=8)
    expected = 1 / torch.arange(1.0, 9)
    assert torch.allclose(counts / 4000, expected / expected.sum(), atol=0.03)


def literal(x, router, a, b, top_k):
    """The formula token by token, expert by expert and number by number."""
    r = len(a) // len(router)
    out = []
    for token in x:
        p = torch.softmax(router @ token, 0)
        picked = p.argsort(descending=True)[:top_k]
        weights = p[picked] / (p[picked].sum() if top_k > 1 else 1)
        y = 0
        for g, e in zip(weights, picked.tolist()):
            rows = slice(e * r, (e + 1) * r)
            y = y + g * (b[rows].T @ (a[rows] @ token))
        out.append(y)
    return torch.stack(out)


@some_shapes
@pytest.mark.parametrize("peer", SAME, ids=lambda peer: peer.name)
def test_peers_compute_the_formula(shape, peer):
    """Outputs and all gradients, ours included."""
    inputs = sample(shape, torch.float64)
    if peer.name == "grouped_mm":  # does not support fp64
        inputs = dataclasses.replace(
            inputs, **{n: getattr(inputs, n).float() for n in ("x", "router", "a", "b", "dy")}
        )
    states = entry.states(peer.layout, shape, inputs, True, 1)
    out = entry.joined(
        entry.prepare(peer.forward, states, shape.K, inputs.dy)(), peer.layout, shape
    )
    double = [getattr(inputs, n).double().requires_grad_() for n in ("x", "router", "a", "b")]
    y = literal(*double, shape.K)
    right = [y, *torch.autograd.grad(y, double, inputs.dy.double())]
    limit = 64 if inputs.x.dtype == torch.float32 else 1000  # units in the last place
    assert entry.units(out, right, inputs.x.dtype) < limit
    assert all(0.05 < t.square().mean().sqrt() < 50 for t in (y, right[1]))


def test_plain_lora_equals_pefts():
    peft = pytest.importorskip("peft")
    base = torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False))
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    wrapped = peft.get_peft_model(base, config).base_model.model[0]
    x = sample(SMALL, torch.float32).x
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    with torch.no_grad():
        assert torch.equal(wrapped.base_layer(x) + peers.plain_lora(x, None, a, b, 2), wrapped(x))


def wrong_gate(x, router, a, b, top_k):
    return 1.1 * peers.stacked(x, router, a, b, top_k)


def wrong_gradient(x, router, a, b, top_k):
    return peers.stacked(x, router, a.detach() * 0.5 + a * 0.5, b, top_k)


def not_a_number(x, router, a, b, top_k):
    return peers.stacked(x, router, a, b, top_k) * float("nan")


def crash(*args):
    raise RuntimeError("\nfirst line\nsecond")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_contenders_are_not_timed(monkeypatch, dtype):
    names = (wrong_gate, wrong_gradient, not_a_number, crash, peers.stacked)
    monkeypatch.setattr(
        entry, "contenders", lambda *_: [entry.Contender(f.__name__, f) for f in names]
    )
    inputs = sample(SMALL, dtype)
    calls, errors, left_out = suite.admit(SMALL, inputs, True, 1, suite.Options(compiled=False))
    assert list(calls) == ["stacked"]
    assert errors["stacked"] < entry.LIMITS[dtype]
    assert left_out["crash"] == "RuntimeError: first line"
    assert all("from fp64" in left_out[f.__name__] for f in names[:3])


def test_contenders_too_slow_or_too_large_are_left_out():
    with pytest.raises(entry.LeftOut, match="GiB"):
        entry.refuse_hopeless("gather, compiled", Shape(8192, 4096, 4096, 8, 64), 4)
    with pytest.raises(entry.LeftOut, match="experts"):
        entry.refuse_hopeless("every expert, compiled", Shape(1, 64, 64, 64, 8), 4)
    with pytest.raises(entry.LeftOut, match="16 tokens"):
        entry.refuse_hopeless("ours, decode", Shape(17, 64, 64, 8, 8), 4)
    entry.refuse_hopeless("ours, decode", Shape(16, 64, 64, 8, 8), 4)
    entry.refuse_hopeless("loop", Shape(8192, 4096, 4096, 64, 64), 4)


def test_compiled_peers_are_among_the_contenders():
    names = [c.name for c in entry.contenders(compiled=True) if report.is_peer(c.name)]
    same = [p.name for p in peers.PEERS if p.same]
    assert names == [text for name in same for text in (name, f"{name}, compiled")]


def test_gates_per_sample_are_timed_beside_poly(monkeypatch, capsys):
    pytest.importorskip("peft")
    from benchmarks import per_sample

    monkeypatch.setattr(per_sample, "SHAPES", ((16, 12, 20),))
    monkeypatch.setattr(per_sample, "SAMPLES", (4,))
    per_sample.main(["--turns", "2", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    for name in (per_sample.THEIRS, *per_sample.ours()):
        assert sum(line.startswith(f"  {name} ") for line in lines) == 4  # two kinds, two dtypes
    grads = [
        call() for call in per_sample.contenders("added", 16, 12, 20, 4, torch.float32).values()
    ]
    assert all(g.abs().max() > 0 for grad in grads for g in grad[:3])
