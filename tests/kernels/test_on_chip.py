"""The accounting's bytes read from L2 equal those that the interpreter counts."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.static import gpu_model
from benchmarks.static.on_chip import AGAIN, SEGMENTED, Call, on_chip

from ..support.cases import Case, sample
from ..support.compiled import run_compiled
from ..support.interpreter import interpreting

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("needs the interpreter, which is not there with a GPU", allow_module_level=True)
with interpreting():
    kernels = importlib.import_module("lora_moe.triton_kernels")

FULL = Case("", 70, 8, 2, 16, 136, 200)  # ragged sizes except E and R, which loads read whole


@contextlib.contextmanager
def loads():
    """A list of launches, each with the loaded bytes and the addresses per argument."""
    from triton.runtime import interpreter

    call, load = (
        interpreter.GridExecutor.__call__,
        interpreter.InterpreterBuilder.create_masked_load,
    )
    seen, tensors = [], {}

    def counted_call(executor, *args, **kwargs):
        values = dict(zip(executor.arg_names, args)) | kwargs
        tensors.clear()
        tensors.update({n: v for n, v in values.items() if isinstance(v, torch.Tensor)})
        launch = SimpleNamespace(
            name=executor.fn.__name__, args=values, options={}, grid=executor.grid
        )
        seen.append((launch, Counter(), {}))
        return call(executor, *args, **kwargs)

    def counted_load(builder, pointers, mask, *rest):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if addresses.size:
            name, v = owner(int(addresses.flat[0]))
            if name is not None:
                _, total, distinct = seen[-1]
                total[name] += addresses.size * v.element_size()
                distinct.setdefault(name, set()).update(addresses.flatten().tolist())
        return load(builder, pointers, mask, *rest)

    def owner(address):
        for name, v in tensors.items():
            if v.data_ptr() <= address < v.data_ptr() + v.numel() * v.element_size():
                return name, v
        return None, None

    interpreter.GridExecutor.__call__ = counted_call
    interpreter.InterpreterBuilder.create_masked_load = counted_load
    try:
        yield seen
    finally:
        interpreter.GridExecutor.__call__ = call
        interpreter.InterpreterBuilder.create_masked_load = load


def run_every_dense_kernel():
    v = sample(FULL, torch.bfloat16)
    kernels.router_topk(
        v["x"], v["router_weight"].float(), None, None, 2, "softmax", True, 2.0, 0.0
    )
    kernels.shrink(v["x"], v["lora_A"], v["router_weight"].float())
    for T in (70, 15):  # in one launch, and with `shrink` first
        forward_and_backward(v, T, "rank_dense")


def forward_and_backward(v, T, plan):
    x, w, a, b = (v[n] for n in ("x", "router_weight", "lora_A", "lora_B"))
    w, offsets = w.float(), list(range(0, FULL.R + 1, 16))
    *routing, s = kernels.routed_lora(
        x[:T], w, a, b, v["base"][:T], None, None, v["scaling"], offsets, False, 2, "softmax", True,
        2.0, 0.0, plan,
    )  # fmt: skip
    kernels.routed_lora_backward(
        v["base"][:T], None, None, None, None, x[:T], w, a, b, s, *routing[1:4], v["scaling"], offsets,
        False, "softmax", True, (), *[True] * 4, False, plan,
    )  # fmt: skip


def test_reads_are_counted_for_all_programs():
    with loads() as seen:
        run_every_dense_kernel()
    checked = set()
    for launch, total, distinct in seen:
        if launch.name not in AGAIN:
            continue
        wide = {n for n in AGAIN[launch.name] if total[n]} | {
            "x_ptr",
            "x3_ptr",
            "dy_ptr",
            "base_ptr",
        }
        once = {
            n: len(addresses) * launch.args[n].element_size()
            for n, addresses in distinct.items()
            if n in wide
        }
        assert on_chip(launch, once).l2 == sum(total[n] for n in once), (launch.name, total)
        checked |= {(launch.name, n) for n in once}
    assert {name for name, _ in checked} == set(AGAIN)
    left = {(name, n) for name, axes in AGAIN.items() for n in axes} - checked
    assert left == set(), left


GATHERED = {  # what does not depend on how many experts a tile holds
    "_segmented_rank_gradient_kernel": ("dy_ptr",),
    "_segmented_expand_kernel": ("s_ptr", "h2_ptr", "b2_ptr", "base_ptr"),
    "_segmented_wgrad_kernel": ("x_ptr", "h_ptr"),
}


def test_reads_of_the_segmented_plan():
    with loads() as seen:
        forward_and_backward(sample(FULL, torch.bfloat16), 70, "segmented")
    checked = set()
    for launch, total, distinct in seen:
        once = {n: len(at) * launch.args[n].element_size() for n, at in distinct.items()}
        if launch.name in GATHERED:
            counted = SEGMENTED[launch.name](Call(launch), once)
            names = [n for n in GATHERED[launch.name] if n in total]
            assert {n: counted[n] for n in names} == {n: total[n] for n in names}, launch.name
            checked |= {(launch.name, n) for n in names}
        if launch.name == "_segmented_rank_gradient_kernel":  # some tiles are left over
            assert total["b_ptr"] <= counted["b_ptr"]
    assert checked == {(kernel, n) for kernel, names in GATHERED.items() for n in names}


def test_a_program_more_than_there_are_multiprocessors_takes_a_second_wave():
    part = gpu_model.GPUS["H100"]
    one, two = (gpu_model.seconds(part, 0, n * 1e6, 0, n) for n in (132, 133))
    assert two == pytest.approx(2 * one)
    assert gpu_model.seconds(part, 3e12, 0, 0) == 1


def test_a_product_is_no_faster_than_reading_its_operands():
    part = gpu_model.GPUS["H100"]
    for M, N, K in ((8192, 128, 4096), (128, 4096, 8192), (8192, 4096, 128), (8192, 8, 4096)):
        floor = 2 * (M * K + N * K + M * N) / part.bytes_per_s
        assert floor <= gpu_model.product(part, M, N, K) < 4 * floor


def test_the_table_has_every_row():
    out = json.loads(
        run_compiled("benchmarks.gpu_model", "--json", "--T", "8192", "--gpus", "H100")
    )
    ((forward, backward), *rivals), floor = out["H100"], 2 * 3 * 8192 * 4096 / 3.0e6
    assert floor < forward < 2 * floor and 2 * floor < backward
    assert all(0.4 * floor < side for rival in rivals for side in rival)
