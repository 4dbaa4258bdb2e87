"""Bugs planted in our kernels, one source substitution each, and the check that must catch each.

The checks are those of every kernel test: the sanitizer, memory and undefined lanes filled with NaN,
assertions on int32, and the comparison with the reference.  A substitution that no longer applies is an
error: move the bug to the new place of the code.
"""

from __future__ import annotations

import importlib
import itertools
import mmap
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lora_moe import Routing
from lora_moe import functional as F
from lora_moe.plan import DECODE, RANK_DENSE, SEGMENTED, override

from ..support import slots
from ..support.cases import Case, in_double, sample
from ..support.compare import assert_accurate
from ..support.interpreter import Sanitizer, interpreting, overflow_checked
from ..support.through import NAMES, results, through

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU nothing is interpreted", allow_module_level=True)

SOURCES = Path(__file__).parents[2] / "triton_kernels"
LAYER = Case("several tiles", 70, 4, 2, 16, 72, 80)  # no size is a multiple of a tile
LONG = Case("several splits of tokens", 300, 4, 2, 4, 40, 40)
FEW = Case("D in splits", 5, 4, 2, 16, 72, 80)
IDLE = Case("most experts idle", 5, 16, 1, 4, 40, 40, renormalize=False)
SLOTS = Case("slots", 20, 3, 2, 4, 24, 40)
number = itertools.count()


class Bug(NamedTuple):
    file: str
    old: str
    new: str
    found: str  # matches the message of the check
    call: str = "layer"
    case: Case = LAYER
    plan: str = RANK_DENSE


OUTSIDE = "outside of every argument"
BETWEEN = "between the rows"
TWO = "two programs|another has read"
INT32 = "overflow"
WRONG = "relative error"
NAN = "relative error inf"

BUGS = {
    "mask dropped from a store": Bug(
        "expand", "tl.store(y_ptr + t[:, None] * D + d[None, :], y, mask=inside)",
        "tl.store(y_ptr + t[:, None] * D + d[None, :], y)", f"{OUTSIDE}|{TWO}",
    ),
    "token mask dropped from a load": Bug(
        "wgrad", "x = tl.load(x_ptr + t * stride_xt + d, mask=(t < last) & (d < D)",
        "x = tl.load(x_ptr + t * stride_xt + d, mask=(d < D)", f"{OUTSIDE}|{BETWEEN}",
    ),
    "column mask dropped from a load": Bug(
        "numerics", "x = tl.load(x_row + d, mask=t_ok[:, None] & (d < last), other=0.0)",
        "x = tl.load(x_row + d, mask=t_ok[:, None], other=0.0)", BETWEEN,
    ),
    "other dropped in front of a dot": Bug(
        "numerics", "x = tl.load(x_row + d, mask=t_ok[:, None] & (d < last), other=0.0)",
        "x = tl.load(x_row + d, mask=t_ok[:, None] & (d < last))", NAN,
    ),
    "other dropped in front of a dot over tokens": Bug(
        "wgrad", "mask=(t < last) & (d < D), other=0.0)", "mask=(t < last) & (d < D))", NAN,
    ),
    "stride of the wrong tensor": Bug(
        "expand", "base_ptr + t[:, None] * stride_baset + d[None, :]",
        "base_ptr + t[:, None] * D + d[None, :]", BETWEEN,
    ),
    "stride of the transposed": Bug(
        "expand", "tl.store(y_ptr + t[:, None] * D + d[None, :], y, mask=inside)",
        "tl.store(y_ptr + t[:, None] + d[None, :] * T, y, mask=inside)", WRONG,
    ),
    "row offset in int32": Bug(
        "expand", "t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)",
        "t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)", INT32, "far_rows",
    ),
    "row offset in int32, tokens of a split": Bug(
        "wgrad", "t = (t0 + tl.arange(0, BLOCK_T).to(tl.int64))[:, None]",
        "t = (t0 + tl.arange(0, BLOCK_T)).to(tl.int32)[:, None]", INT32, "far_rows",
    ),
    "every program of a row writes the same tile": Bug(
        "expand", "d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)",
        "d = tl.arange(0, BLOCK_D)", TWO,
    ),
    "partial sums all in one place": Bug(
        "shrink", "t0 += split.to(tl.int64) * T", "t0 += 0 * split.to(tl.int64) * T", TWO, case=FEW,
    ),
    "partial sum read before it is written": Bug(
        "wgrad", "    total2 = tl.zeros((BLOCK_R2, BLOCK_D), tl.float32)\n",
        "    total2 = tl.zeros((BLOCK_R2, BLOCK_D), tl.float32)\n"
        "    far = out_ptr + ((split + 1) * R + row)[:, None] * D + d\n"
        "    more = (split + 1 + 0 * d < tl.num_programs(2)) & (row < R)[:, None] & (d < D)\n"
        "    total += tl.load(far, mask=more, other=0.0)\n",
        TWO, case=LONG,
    ),
    "last tile left unwritten": Bug(
        "expand", '(triton.cdiv(T, tile["BLOCK_T"]), triton', '(T // tile["BLOCK_T"], triton', NAN,
    ),
    "partial sum left unwritten": Bug(
        "shrink", "inside = t_ok[:, None] & row_ok[None, :]",
        "inside = t_ok[:, None] & (row_ok & (row < R - split * R))[None, :]", NAN, case=FEW,
    ),
    "ranks past the first block forgotten": Bug(
        "expand", "for r0 in range(0, R, BLOCK_R):", "for r0 in range(0, tl.minimum(R, 16), 16):", WRONG,
    ),
    "segmented: other dropped from a gather": Bug(
        "segmented_wgrad", "mask=(i < stop)[:, None] & (d < D)[None, :], other=0.0)",
        "mask=(i < stop)[:, None] & (d < D)[None, :])", NAN, plan=SEGMENTED,
    ),
    "segmented: experts without a token left unwritten": Bug(
        "segmented_wgrad", "    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)\n",
        "    if start == stop:\n        return\n    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)\n",
        NAN, case=IDLE, plan=SEGMENTED,
    ),
    "segmented: ties take the same place": Bug(
        "sort_tokens", "(i[None, :] < i[:, None])", "(i[None, :] < 0)",
        f"{OUTSIDE}|{BETWEEN}|{WRONG}", plan=SEGMENTED,
    ),
    "segmented: mask dropped from a list": Bug(
        "list_experts", "e, mask=held > 0)", "e)", f"{OUTSIDE}|{TWO}|{WRONG}", plan=SEGMENTED,
    ),
    "segmented: gathered row offset in int32": Bug(
        "segmented_shrink", "t = tl.load(order_ptr + i, mask=t_ok, other=0).to(tl.int64)",
        "t = tl.load(order_ptr + i, mask=t_ok, other=0)", INT32, "far_layer", plan=SEGMENTED,
    ),
    "slots: a row of x for each": Bug(
        "segmented_shrink", "t // SHARE, t_ok", "t, t_ok", f"{OUTSIDE}|{BETWEEN}", "of_slots", SLOTS,
    ),
    "slots: a row of base for each": Bug(
        "segmented_expand", "(t // SHARE)[:, None]", "t[:, None]", f"{OUTSIDE}|{BETWEEN}", "of_slots", SLOTS,
    ),
    "slots: a row of x for each, summed over": Bug(
        "segmented_wgrad", "K=sharing(len(order), x)", "K=1", f"{OUTSIDE}|{BETWEEN}", "of_slots", SLOTS,
    ),
    "slots: wrong divisor": Bug(
        "segmented_shrink", "max(1, n // max(1, len(v)))", "max(1, 2 * n // max(1, len(v)) - 1)", WRONG,
        "of_slots", SLOTS,
    ),
    "slots: a repeated id counts once": Bug(
        "segmented_expand", "return h + s", "return tl.where(mine[:, None], s, h)", WRONG, "of_slots", SLOTS,
    ),
    "slots: weight of the wrong slot": Bug(
        "segmented_expand", "tl.load(weights_ptr + slot,", "tl.load(weights_ptr + t * K,", WRONG,
        "of_slots", SLOTS,
    ),
    "slots: other dropped in front of a dot": Bug(
        "segmented_expand", "mask=mine[:, None] & (c < r), other=0.0)", "mask=mine[:, None] & (c < r))", NAN,
        "of_slots", SLOTS,
    ),
    "decode: every program writes S": Bug(
        "decode", "s, mask=in_first(in_s, split))", "s, mask=in_s)", TWO, case=FEW, plan=DECODE,
    ),
    "decode: partial sums one short": Bug(
        "decode", "s_partial_ptr, SPLITS, T, t0, BANKS", "s_partial_ptr, SPLITS - 1, T, t0, BANKS",
        WRONG, case=FEW, plan=DECODE,
    ),
    "weight of the wrong slot": Bug(
        "gating", "value = tl.load(values_ptr + t * K + j,", "value = tl.load(values_ptr + t * K,", WRONG,
    ),
}  # fmt: skip


@pytest.fixture
def with_source(tmp_path, monkeypatch):
    """Imports the kernels as another package, with a changed source."""

    def load(file=None, old="", new=""):
        name = f"planted_{next(number)}"
        shutil.copytree(SOURCES, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        if file is not None:
            path = tmp_path / name / f"{file}.py"
            text = path.read_text()
            assert old in text, f"{file}.py no longer has {old!r}"
            path.write_text(text.replace(old, new))
        monkeypatch.syspath_prepend(tmp_path)
        with interpreting():
            return importlib.import_module(name)

    return load


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(with_source, name):
    bug = BUGS[name]
    kernels = with_source(bug.file, bug.old, bug.new)
    with pytest.raises(Exception, match=bug.found) as caught:
        CALLS[bug.call](kernels, bug)
    assert not isinstance(caught.value, (TypeError, NameError, AttributeError))


@pytest.mark.parametrize("call, case, plan", sorted({b[4:] for b in BUGS.values()}, key=str))
def test_without_a_bug_nothing_is_found(with_source, call, case, plan):
    CALLS[call](with_source(), Bug("", "", "", "", call, case, plan))


# --- the calls -----------------------------------------------------------------------------------


def layer(kernels, bug):
    """routed_lora, forward and backward, under the sanitizer and against the reference in fp64."""
    v = sample(bug.case)
    want = results(in_double(v), bug.case, torch.float64)
    v = {k: gapped(t) if k in ("x", "base") else t for k, t in v.items()}
    with Sanitizer() as sanitizer, through(kernels), override(bug.plan):
        got = results(v, bug.case, torch.float32)
    assert sanitizer.launches > 0
    for name, g, w in zip(NAMES, got, want):
        assert_accurate(name, g, w, units=20)


def of_slots(kernels, bug):
    """Both forms of slots, forward and backward, with the same checks."""
    for form in ("apart", "sum"):
        v = slots.inputs_of(bug.case, form, torch.float32)
        v = {k: gapped(t) if k in ("x", "base", "dy") else t for k, t in v.items()}
        with Sanitizer():
            got = slots.results(kernels, v, bug.case, form)
        slots.compare(got, v, bug.case, form, torch.float32)


def gapped(t):
    """The same rows with gaps of NaN between them."""
    wide = torch.full((len(t), t.shape[1] + 5), float("nan"), dtype=t.dtype)
    wide[:, :-5] = t
    return wide[:, :-5]


def far_apart():
    """A few rows so far apart that offsets need 64 bits; the memory is mapped, not filled."""
    rows, D, stride = 3, 32, 2**30 + 8
    memory = torch.frombuffer(mmap.mmap(-1, 2 * ((rows - 1) * stride + D)), dtype=torch.bfloat16)
    return memory.as_strided((rows, D), (stride, 1))


def far_rows(kernels, bug):
    x = far_apart()
    h, b = torch.ones(len(x), 16), torch.ones(16, x.shape[1], dtype=torch.bfloat16)
    with overflow_checked():
        kernels.wgrad(h, x)
        kernels.expand(h, b, None, None, x, torch.bfloat16)


def far_layer(kernels, bug):
    x = far_apart()
    a = torch.ones(16, x.shape[1], dtype=torch.bfloat16)
    routing = Routing.from_ids(torch.tensor([[0, 1], [2, 3], [1, 2]]), num_experts=4)
    with overflow_checked(), through(kernels), override(bug.plan):
        F.grouped_lora(x, a, a, routing, rank_offsets=4)


CALLS = {"layer": layer, "of_slots": of_slots, "far_rows": far_rows, "far_layer": far_layer}
