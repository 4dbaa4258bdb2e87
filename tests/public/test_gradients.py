"""Incoming gradients as losses produce them: expanded, transposed, sliced, missing; on every backend.

`y.sum()` passes one expanded number, `y.T @ z` a transposed matrix, `y[:, ::2]` of a view a slice, and an
output that the loss does not use passes none.  The reference is the stacked formulation of
eager.py in fp64, with gradients from autograd.

Letters: T tokens, E experts, K picked experts per token, R rank rows of all experts.
"""

from __future__ import annotations

import pytest
import torch

from ..support import eager
from ..support import grouped_slots as slots_of
from ..support.cases import BY_NAME, in_double, leaves, sample, some_cases
from ..support.compare import assert_accurate
from ..support.functions import (
    PARAMETERS,
    USED,
    every_dtype,
    every_function,
    expand,
    from_logits,
    grouped_lora,
    inputs_of,
    routed,
    routed_lora,
    router_topk,
    shrink,
)


def expanded(g, shape):
    """One row shared by all tokens."""
    return torch.randn(shape[1:], generator=g, dtype=torch.float64).expand(shape)


def one_number(g, shape):
    return torch.randn((), generator=g, dtype=torch.float64).expand(shape)


def transposed(g, shape):
    return torch.randn(shape[::-1], generator=g, dtype=torch.float64).permute(
        *range(len(shape))[::-1]
    )


def sliced(g, shape):
    """Every second row and column of a larger tensor, starting at an odd offset."""
    frame = torch.randn([2 * n + 3 for n in shape], generator=g, dtype=torch.float64)
    return frame[tuple(slice(1, 2 * n + 1, 2) for n in shape)]


def rows_of_a_frame(g, shape):
    """Unit stride along columns, with gaps between rows."""
    frame = torch.randn(*shape[:-1], shape[-1] + 3, generator=g, dtype=torch.float64)
    return frame[..., 2 : shape[-1] + 2]


LAYOUTS = [expanded, one_number, transposed, sliced, rows_of_a_frame]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)


def as_laid_out(layout, g, output):
    """A gradient of `output` in its dtype, and the same numbers contiguous in fp64."""
    wanted = layout(g, tuple(output.shape))
    strides = wanted.stride()
    # .to() alone would drop strides of 0 and gaps
    storage = wanted.as_strided((wanted.untyped_storage().nbytes() // 8,), (1,), 0)
    grad = storage.to(output.dtype).as_strided(wanted.shape, strides, wanted.storage_offset())
    assert grad.stride() == strides
    return grad, grad.double().contiguous()


def check(function, case, dtype, layout, which=None):
    """Gradients of all outputs, or of output number `which` alone, against fp64."""
    inputs = leaves(inputs_of(case, dtype), *USED[function])
    outputs, truth = function(inputs, case)
    names = [n for n in USED[function] if inputs[n] is not None]
    g = torch.Generator().manual_seed(5)
    grads, exact_grads = zip(*(as_laid_out(layout, g, o) for o in outputs), strict=True)
    chosen = range(len(outputs)) if which is None else [which]

    def gradients(outputs, inputs, grads):
        return torch.autograd.grad(
            [outputs[i] for i in chosen], [inputs[n] for n in names], [grads[i] for i in chosen],
            allow_unused=True,
        )  # fmt: skip

    got = gradients(outputs, inputs, grads)
    exact = leaves(in_double(inputs_of(case, dtype)), *USED[function])
    want = gradients(truth(exact), exact, exact_grads)
    low = dtype in (torch.bfloat16, torch.float16)
    for name, out, truth_of in zip(names, got, want, strict=True):
        if truth_of is None:
            assert out is None or not out.any(), name
            continue
        assert out is not None and out.dtype == inputs[name].dtype, name
        if truth_of.norm() < 1e-12:  # no tokens, or weights that sum to 1
            assert out.shape == truth_of.shape and (out.abs() < 1e-5).all(), name
        else:
            # H and dS are rounded to 16 bits before sums in which terms cancel; reading a gradient with
            # another layout's strides gives an error as large as the gradient itself
            assert_accurate(f"d{name}", out, truth_of, dtype=dtype, units=4 if low else 64)


@every_layout
@every_function
@every_dtype
@some_cases("odd", "unequal ranks", "shared A", "no rows", "one expert")
def test_every_layout_of_every_output(case, dtype, function, layout):
    check(function, case, dtype, layout)


@every_layout
@pytest.mark.parametrize("form", ["apart", "sum"])
def test_every_layout_with_a_row_per_slot(form, layout):
    case = BY_NAME["odd"]
    inputs = slots_of.inputs_of(case, torch.float32, form)
    v, exact = leaves(inputs, *slots_of.NAMES), leaves(in_double(inputs), *slots_of.NAMES)
    y, truth = slots_of.ours(v, case, form), slots_of.theirs(exact, case, form)
    dy, exact_dy = as_laid_out(layout, torch.Generator().manual_seed(5), y)
    got = torch.autograd.grad(y, [v[n] for n in slots_of.NAMES], dy)
    want = torch.autograd.grad(truth, [exact[n] for n in slots_of.NAMES], exact_dy)
    for name, g, w in zip(slots_of.NAMES, got, want, strict=True):
        assert_accurate(f"d{name}", g, w, units=64)


OUTPUTS = {routed_lora: 5, router_topk: 4, from_logits: 4, grouped_lora: 1, shrink: 2, expand: 1}
ALONE = [(function, which) for function, n in OUTPUTS.items() for which in range(n) if n > 1]


@pytest.mark.parametrize(
    "function, which", ALONE, ids=lambda v: v if isinstance(v, int) else v.__name__
)
@some_cases("odd", "shared A", "no rows")
def test_one_output_alone(case, function, which):
    """The gradients of all other outputs are missing."""
    check(function, case, torch.float32, sliced, which)


def test_a_loss_on_the_routing_beside_one_on_y():
    """A form common in bug reports: y.square().sum() + weights.sum()."""
    case = BY_NAME["tiles fit"]
    v = leaves(sample(case), *PARAMETERS)
    y, routing = routed(v, case)
    loss = y.square().sum() + routing.weights.sum() + routing.logits.T[0].sum() + routing.lse.sum()
    (loss + routing.mean_prob.sum()).backward()
    exact = leaves(in_double(sample(case)), *PARAMETERS)
    y, weights, logits, mean_prob, lse = eager.routed_lora(exact, case, routing.indices)
    loss = y.square().sum() + weights.sum() + logits.T[0].sum() + lse.sum() + mean_prob.sum()
    loss.backward()
    for name in ("x", "router_weight", "lora_A", "lora_B", "base"):
        assert_accurate(f"d{name}", v[name].grad, exact[name].grad, units=16)
