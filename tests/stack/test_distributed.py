"""Training and saving over two processes: the checks of tests/stack/processes, one test each.

One torchrun runs many checks, because starting it takes longer than the checks.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from lora_moe import adapter_info

from .processes.run import checks_of
from .processes.torchrun import run_to_the_end

ROOT = Path(__file__).parents[2]
MODULES = ["training", "saving", "accelerated", "freezing", "precision", "native"]
DEEPSPEED = (
    ROOT / "build" / "deepspeed"
)  # where `make test` installs it, hidden from all other tests
CHECKS_OF_ZERO = [
    "check_zero_2",
    "check_zero_3",
    "check_saved_both_ways",
    "check_loaded_values_outlive_a_step",
    "check_save_pretrained",
    "check_frozen_experts_are_refused",
    "check_inject_comes_too_late",
]
pytestmark = pytest.mark.slow


def torchrun(*args, cwd=ROOT, **environment):
    """Two processes, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(ROOT), str(DEEPSPEED)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    return run_to_the_end([*command, *args], cwd=cwd, env=environment, timeout=600)


def outcomes(directory: Path, modules: list[str], **environment) -> list[dict]:
    """[{check: "" or a traceback}] of each process; xdist workers share one run."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        log = directory / "log"
        if not log.exists():
            ran = torchrun(
                "-m", "tests.stack.processes.run", str(directory), *modules, **environment
            )
            log.write_text(ran.stdout + ran.stderr)
    found = [directory / f"{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in found), log.read_text()[-3000:]
    return [json.loads(path.read_text()) for path in found]


def shared(tmp_path_factory, name) -> Path:
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / name


def expect_passed(found, check, directory):
    for rank, of_rank in enumerate(found):
        log = (directory / "log").read_text()[-3000:]
        assert check in of_rank, f"process {rank} did not reach it:\n{log}"
        assert not of_rank[check], f"process {rank}:\n{of_rank[check]}"


def named(modules):
    return [
        f"{name}.{check}"
        for name in modules
        for check in checks_of(importlib.import_module(f".processes.{name}", __package__))
    ]


@pytest.mark.parametrize("check", named(MODULES))
def test_two_processes(check, tmp_path_factory):
    directory = shared(tmp_path_factory, "two_processes")
    expect_passed(outcomes(directory, MODULES), check, directory)


@pytest.mark.parametrize("check", CHECKS_OF_ZERO)
def test_zero(check, tmp_path_factory):
    if not ((DEEPSPEED / "deepspeed").exists() or importlib.util.find_spec("deepspeed")):
        pytest.skip("DeepSpeed is not installed (make build/deepspeed)")
    directory = shared(tmp_path_factory, "zero")
    found = outcomes(directory, ["zero"], DS_ACCELERATOR="cpu")
    assert {name.removeprefix("zero.") for name in found[0]} == set(CHECKS_OF_ZERO)
    expect_passed(found, f"zero.{check}", directory)


@pytest.mark.parametrize("kind", ["FSDP2", "DDP"])
def test_the_example_of_the_docs(kind, tmp_path):
    """The example as printed, and with the change that the page describes."""
    text = (ROOT / "docs" / "distributed.md").read_text()
    example = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[0]
    if kind == "DDP":
        sharding = r"for layer in model.*\n    fully_shard.*\nfully_shard.*\n"
        (change,) = re.findall(r"with\s`(model = .*)`", text)
        example, changes = re.subn(sharding, change + "\n", example)
        assert changes == 1
    (tmp_path / "train.py").write_text(example)
    ran = torchrun(str(tmp_path / "train.py"), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    layers = adapter_info(tmp_path / "adapter")["adapters"][0]["modules"]
    assert len(layers) == 2 * 7
