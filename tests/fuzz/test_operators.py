"""Random operator calls, each compared with the formula in fp64: shapes, strides, dtypes, gradients.

Randomized are T, E, K, ranks, D; gate, shared A, biases; the memory layout of every operand (contiguous,
transposed, sliced, expanded); which operands require gradients; and, for each output, a gradient that is
contiguous, expanded, transposed, sliced, or missing.  LORA_MOE_NIGHTLY=n draws n times as many; a failure
names its seed.  LORA_MOE_BACKEND and LORA_MOE_ISA select the implementation under test.
"""

from __future__ import annotations

import os
import random
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch

from lora_moe import functional as F
from lora_moe import reference

from ..support import eager
from ..support.compare import UNIT, relative_error
from .loaders import NIGHTLY

CALLS = 60 * NIGHTLY
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
if os.environ.get("LORA_MOE_BACKEND") == "triton":
    DTYPES, CALLS = DTYPES[:3], 6 * NIGHTLY
LIMIT = {
    torch.float64: 1e-12,
    torch.float32: 64 * UNIT[torch.float32],
}  # of a norm, in small shapes
MARGIN = 1e-3  # between the last picked gate and the next; closer ones may be picked either way


def memory(tensor, rng):
    """A tensor with the same values in a random memory layout."""
    how = rng.choice(["contiguous", "transposed", "sliced rows", "sliced columns", "offset"])
    if how == "transposed":
        return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
    if how in ("sliced rows", "sliced columns") and tensor.dim() == 2:
        rows, columns = tensor.shape
        step = (2, 1) if how == "sliced rows" else (1, 2)
        wide = tensor.new_full((rows * step[0] + 1, columns * step[1] + 1), float("nan"))
        view = wide[: rows * step[0] : step[0], : columns * step[1] : step[1]]
        return view.copy_(tensor)
    if how == "offset":
        flat = tensor.new_full((tensor.numel() + 3,), float("nan"))
        return flat[3:].view(tensor.shape).copy_(tensor)
    return tensor.contiguous()


def incoming(output, rng):
    """A gradient for an output in a random layout, or None if the loss does not depend on it."""
    how = rng.choice(["any", "any", "expanded", "missing"])
    if how == "missing":
        return None
    if how == "expanded":
        return output.new_full((1,) * output.dim(), rng.uniform(-2, 2)).expand(output.shape)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    values = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return memory(values, rng)


def draw(seed):
    """The arguments of one routed_lora call, and the same values in fp64 for the formula."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = rng.choice(DTYPES)
    T, E = rng.choice([0, 1, 2, 7, 16, 17, 33, 70]), rng.choice([1, 2, 3, 7, 8, 17])
    K, shared = rng.randint(1, min(E, 4)), rng.random() < 0.3
    ranks = [rng.choice([1, 2, 4, 8, 17])] * E
    if not shared and rng.random() < 0.4:
        ranks = [rng.choice([1, 2, 3, 8, 24]) for _ in range(E)]
    D_in, D_out = rng.choice([1, 5, 16, 33, 97, 130]), rng.choice([1, 3, 16, 40, 129])
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, scale=1.0, to=dtype):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(to)

    R = sum(ranks)
    tensors = {
        "x": normal(T, D_in),
        "w": normal(E, D_in, scale=2 * D_in**-0.5, to=acc),
        "a": normal(ranks[0] if shared else R, D_in, scale=D_in**-0.5),
        "b": normal(R, D_out, scale=0.5),
        "base": normal(T, D_out) if rng.random() < 0.7 else None,
        "bias": normal(E, scale=0.2, to=acc) if rng.random() < 0.3 else None,
        "scaling": (torch.rand(E, generator=generator) + 0.5).to(acc),
    }
    choice = {
        "gate": rng.choice(["softmax", "sigmoid"]),
        "renormalize": rng.random() < 0.5,
    }
    tensors = {k: t if t is None or t.dim() < 2 else memory(t, rng) for k, t in tensors.items()}
    trained = [
        k for k in ("x", "w", "a", "b", "base") if tensors[k] is not None and rng.random() < 0.7
    ]
    return rng, dtype, K, ranks, shared, tensors, choice, trained


def leaves(tensors, trained, dtype=None):
    """Leaf tensors that share memory, or have the same values in another dtype."""
    kept = {k: t if t is None else t.detach().to(dtype or t.dtype) for k, t in tensors.items()}
    return {k: t if t is None else t.requires_grad_(k in trained) for k, t in kept.items()}


def close_call(gates, K):
    """Whether rounding may decide a pick."""
    if gates.shape[1] <= K or not len(gates):
        return False
    best = gates.sort(1, descending=True)[0]
    return bool(((best[:, K - 1] - best[:, K]) < MARGIN).any())


def compare(seed, name, got, want, dtype, plain=(), terms=None):
    """Asserts an error of a few units or, if terms cancel, a few times that of eager PyTorch or of fp32.

    The factor allows for chance: few numbers are rounded in both.  For `terms` see terms_of.
    """
    if want is None or got is None:
        assert got is None or not got.any(), f"seed {seed}: {name}: a gradient where none is due"
        assert want is None or not want.any(), f"seed {seed}: {name}: no gradient"
        return
    assert got.shape == want.shape, f"seed {seed}: {name}: {tuple(got.shape)}, {tuple(want.shape)}"
    tiny = float(want.norm()) <= 1e-6 * want.numel() ** 0.5  # zero except for rounding
    error = float(got.norm()) if tiny else relative_error(got, want)
    limit = 1e-2 if tiny else LIMIT.get(dtype, 4 * UNIT.get(dtype, 0))
    if dtype != torch.float64 and not tiny:
        limit = max([limit, *(4 * relative_error(p, want) for p in plain)])
        if terms is not None:
            limit = max(limit, UNIT[dtype] * float(terms.norm() / want.norm()))
    assert error <= limit, f"seed {seed}: {name}: {error / UNIT[dtype]:.1f} u in {dtype}"


def backward(outputs, gradients, inputs):
    """Gradients of the inputs; incoming gradients keep their layout if the dtypes agree."""
    pairs = [
        (o, g.to(o.dtype)) for o, g in zip(outputs, gradients) if g is not None and o.requires_grad
    ]
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    if not pairs or not wanted:
        return [None] * len(wanted)
    outputs, gradients = zip(*pairs)
    return torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)


def formula(t, ids, ranks, shared, choice):
    """((y, weights of the picked experts), all gates), differentiable by autograd."""
    logits = t["x"] @ t["w"].to(t["x"].dtype).T
    gates = logits.softmax(1) if choice["gate"] == "softmax" else logits.sigmoid()
    picked = gates.gather(1, ids.long())
    weights = picked / picked.sum(1, keepdim=True) if choice["renormalize"] else picked
    experts = t["scaling"].to(weights.dtype), [0, *accumulate(ranks)], shared
    y, _ = reference.grouped_lora(t["x"], t["a"], t["b"], t["base"], ids, weights, *experts)
    return (y, weights), gates


def usual(t, ids, ranks, shared, choice):
    """y and the weights as eager PyTorch computes them in x's dtype; H is rounded, as kernels may do."""
    case = SimpleNamespace(E=len(ranks), offsets=[0, *accumulate(ranks)], shared_a=shared, **choice)
    inputs = {
        "x": t["x"], "router_weight": t["w"], "lora_A": t["a"], "lora_B": t["b"], "base": t["base"],
        "scaling": t["scaling"], "router_bias": None,
    }  # fmt: skip
    y, weights, *_ = eager.routed_lora(inputs, case, ids)
    return y, weights


def terms_of(t, weights, ids, ranks, shared):
    """|base| + |H| |B| bounds the error of y, in units, if its terms cancel and H is rounded."""
    case = SimpleNamespace(E=len(ranks), offsets=[0, *accumulate(ranks)], shared_a=shared)
    s = (t["x"] @ t["a"].T).abs()
    base = None if t["base"] is None else t["base"].abs()
    one = torch.eye(s.shape[1], dtype=s.dtype)
    return eager.grouped_lora(s, one, t["b"].abs(), ids, weights, case, base, t["scaling"])


@pytest.mark.parametrize("part", range(6))
def test_routed_lora(part):
    checked = 0
    for seed in range(part, CALLS, 6):
        rng, dtype, K, ranks, shared, tensors, choice, trained = draw(seed)
        mine = leaves(tensors, trained)
        y, routing = F.routed_lora(
            mine["x"], mine["w"], mine["a"], mine["b"], K, rank_offsets=[0, *accumulate(ranks)],
            scaling=mine["scaling"], shared_a=shared, base=mine["base"], bias=mine["bias"], **choice,
        )  # fmt: skip
        truth, plain = (leaves(tensors, trained, d) for d in (torch.float64, torch.float32))
        want, gates = formula(truth, routing.indices, ranks, shared, choice)
        simple, _ = formula(plain, routing.indices, ranks, shared, choice)
        same = leaves(tensors, trained)
        rounded = usual(same, routing.indices, ranks, shared, choice)
        if close_call((gates if truth["bias"] is None else gates + truth["bias"]).detach(), K):
            continue
        terms = terms_of(truth, want[1], routing.indices, ranks, shared).detach()
        for name, *values in zip(("y", "weights"), (y, routing.weights), want, simple, rounded):
            out, right, *plain_ones = (v.detach() for v in values)
            compare(
                seed,
                name,
                out,
                right,
                dtype if name == "y" else torch.float32,
                plain_ones,
                terms if name == "y" else None,
            )
        given = [incoming(out.detach(), rng) for out in (y, routing.weights)]
        names = [k for k in ("x", "w", "a", "b", "base") if k in trained]
        got = backward((y, routing.weights), given, [mine[k] for k in names])
        right = backward(want, given, [truth[k] for k in names])
        others = [
            backward(outputs, given, [t[k] for k in names])
            for outputs, t in ((simple, plain), (rounded, same))
        ]
        for name, mine_of, right_of, *plain_ones in zip(names, got, right, *others):
            compare(seed, f"d{name}", mine_of, right_of, dtype, plain_ones)
        checked += 1
    assert checked >= CALLS // 6 // 3


@pytest.mark.parametrize("product", ["shrink", "expand"])
def test_bare_products(product):
    """S = x A^T, in fp32 or fp64, and y = H B."""
    for seed in range(CALLS // 2):
        rng, dtype, _, ranks, _, tensors, _, _ = draw(10_000 + seed)
        generator = torch.Generator().manual_seed(seed)
        x, b = tensors["x"].detach(), tensors["b"].detach()
        shape = (sum(ranks), x.shape[1]) if product == "shrink" else (len(x), sum(ranks))
        other = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        first, second = (x, memory(other, rng)) if product == "shrink" else (memory(other, rng), b)
        operands = [first.requires_grad_(), second.requires_grad_()]
        if product == "shrink":
            out, second = F.shrink(*operands)[0], second.T
        else:
            out = F.expand(*operands)
        want, plain = first.double() @ second.double(), first.float() @ second.float()
        compare(seed, product, out.detach(), want.detach(), out.dtype, [plain.detach()])
        gradient = incoming(out.detach(), rng)
        if gradient is None:
            continue
        got = torch.autograd.grad(out, operands, gradient)
        right = torch.autograd.grad(want, operands, gradient.double())
        easy = torch.autograd.grad(plain, operands, gradient.float())
        for name, g, r, p in zip(("first", "second"), got, right, easy):
            compare(seed, f"d{name} of {product}", g, r, dtype, [p])
