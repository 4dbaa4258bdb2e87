"""Operators called with operands that do not match; extensions built for other schemas."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lora_moe import backend, backend_info
from lora_moe.ops import SCHEMAS, VERSION

from ..support import on_device
from ..support.cases import BY_NAME
from ..support.operators import operator_calls, ops


@pytest.mark.skipif(backend_info()["serving"]["cpu"] != "cpp", reason="of the C++ backend")
def test_the_cpp_operators_check_their_own_arguments():
    """A direct call of an operator cannot make it read out of bounds."""
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


@pytest.mark.skipif(backend_info()["serving"]["cpu"] != "cpp", reason="of the C++ backend")
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex32,
        torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
    ],
    ids=str,
)  # fmt: skip
def test_the_cpp_operators_name_dtypes_as_pytorch_does(dtype):
    x, name = torch.ones(2, 3), str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"^lora_A: expected float32, got {name}$"):
        ops.shrink(x, torch.empty(2, 3, dtype=dtype), None)
    if dtype not in (torch.float64, torch.bfloat16, torch.float16):
        served = "float32, float64, bfloat16 or float16"
        with pytest.raises(ValueError, match=rf"^x: expected {served}, got {name}$"):
            ops.shrink(x.new_empty(2, 3, dtype=dtype), x, None)


def mixed_calls():
    """Each tensor of each operator's call in turn, moved to another device or made sparse."""
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
    """A direct call is checked too: a kernel's fake would return uninitialized memory."""
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
    """Changing a schema requires a new VERSION: nothing else keeps an old build from misreading operands."""
    digest = hashlib.sha256(repr(sorted(SCHEMAS.items())).encode()).hexdigest()[:12]
    assert (VERSION, digest) == (5, "26b8d06878e1")
    header = Path(__file__).parents[2] / "csrc/tensors.h"
    assert f"kOperators = {VERSION};" in header.read_text()


class Extension:
    """The part of an extension that backend.py uses."""

    def __init__(self, **facts):
        self.build_info = lambda: facts
        self.register_operators = lambda: pytest.fail("registered")


def test_an_extension_for_other_schemas_is_refused():
    old = [Extension(), Extension(operators=VERSION - 1), Extension(operators=VERSION + 1)]
    for extension in old:
        with pytest.raises(
            backend.BackendUnavailable, match=r"built for operator version .*rebuild it"
        ):
            backend._built_for_these_operators(extension)
    assert backend._built_for_these_operators(Extension(operators=VERSION)) == {
        "operators": VERSION
    }
