"""Threads and interrupts: correct results, or a clean exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import lora_moe
from lora_moe import functional as F

from ..support.cases import BY_NAME, sample
from .loaders import NIGHTLY

ROOT = Path(__file__).parents[2]
THREADS, ROUNDS = 8, 5 * NIGHTLY
CASES = [
    BY_NAME[n] for n in ("odd", "one past a tile", "wide", "unequal ranks", "shared A", "no rows")
]
interpreted = os.environ.get("LORA_MOE_BACKEND") == "triton"


def step(case):
    """[y, gradients...] of a call."""
    v = sample(case)
    leaves = [v[k].requires_grad_() for k in ("x", "router_weight", "lora_A", "lora_B")]
    y, routing = F.routed_lora(
        *leaves, case.K, rank_offsets=case.offsets, scaling=v["scaling"], shared_a=case.shared_a,
        base=v["base"], bias=v["bias"], **case.options,
    )  # fmt: skip
    loss = (y * torch.arange(1.0, y.numel() + 1).sin().view(y.shape)).sum() + routing.weights.sum()
    return [y.detach(), *torch.autograd.grad(loss, leaves)]


def same(got, want):
    return all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.skipif(interpreted, reason="Triton's interpreter has global state")
def test_many_threads_at_once():
    """Forward and backward from several Python threads give the same bits as a single call."""
    alone = [step(case) for case in CASES]

    def work(thread):
        order = [(thread + i) % len(CASES) for i in range(len(CASES) * ROUNDS)]
        return all(same(step(CASES[i]), alone[i]) for i in order)

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))


@pytest.mark.skipif(interpreted, reason="Triton's interpreter has global state")
def test_loading_and_saving_in_many_threads(tmp_path):
    """All values of a load come from the same save."""
    config = lora_moe.LoraMoeConfig(num_experts=3, r=2, top_k=2, target_modules=("0",))
    models = []
    for value in (1.0, 2.0):
        model = lora_moe.inject(torch.nn.Sequential(torch.nn.Linear(600, 50)), config)
        for parameter in model.parameters():
            parameter.data.fill_(value)
        models.append(model)
    lora_moe.save_adapter(models[0], tmp_path)

    def work(thread):
        for i in range(5 * NIGHTLY):
            if thread % 2:
                lora_moe.save_adapter(models[(thread + i) % 4 // 2], tmp_path)
            else:
                fresh = torch.nn.Sequential(torch.nn.Linear(600, 50))
                lora_moe.load_adapter(fresh, tmp_path)
                values = {v for t in fresh[0].adapter_state().values() for v in t.unique().tolist()}
                assert values in ({1.0}, {2.0})
        return True

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))
    assert sorted(os.listdir(tmp_path)) == ["README.md", "lora_moe.safetensors"]


CHILD = """
import os, sys, torch
from tests.support.cases import BY_NAME
from tests.fuzz.test_processes import same, step
case = BY_NAME["wide"]
{body}
"""
LOOP = """
step(case)
print("ready", flush=True)
while True:
    step(case)
"""


def child(body):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", CHILD.format(body=body)]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(interpreted, reason="slow, and the same code as without the interpreter")
def test_an_interrupt_ends_in_keyboard_interrupt():
    process = child(LOOP)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
