"""Backends and instruction sets compared, each in a separate process; rows that are far apart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lora_moe
from lora_moe import functional as F
from lora_moe.backend import cpu_isas

from ..support.cases import BY_NAME, sample
from ..support.compare import UNIT, relative_error

ROOT = Path(__file__).parents[2]
BUILT = [isa for isa in cpu_isas() if list(Path(lora_moe.__file__).parent.glob(f"_C_{isa}.*"))]
TWINS = {
    "triton": {"LORA_MOE_BACKEND": "triton", "TRITON_INTERPRET": "1"},
    "reference": {"LORA_MOE_BACKEND": "reference"},
    **{isa: {"LORA_MOE_BACKEND": "cpp", "LORA_MOE_ISA": isa} for isa in BUILT[1:]},
}


def run(file, environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORA_MOE", "TRITON"))}
    command = [sys.executable, "-m", "tests.support.outputs", str(file)]
    subprocess.run(command, cwd=ROOT, env={**kept, **environment}, check=True, timeout=300)
    return load_file(file)


@pytest.fixture(scope="module")
def cpp(tmp_path_factory):
    if not BUILT:
        pytest.skip("the C++ extension is not built")
    return run(tmp_path_factory.mktemp("cpp") / "out.safetensors", {"LORA_MOE_BACKEND": "cpp"})


@pytest.mark.parametrize("twin", TWINS)
def test_same_numbers_in_fp32(twin, cpp, tmp_path):
    """Ids and counts are equal; Triton's outputs within 4 u; gradients and other summation orders 8 u."""
    other = run(tmp_path / "out.safetensors", TWINS[twin])
    assert other.keys() == cpp.keys()
    for name, value in other.items():
        if value.dtype in (torch.int32, torch.int64):
            assert torch.equal(value, cpp[name]), name
        else:
            bound = 4 if twin == "triton" and "/d" not in name else 8
            assert relative_error(value, cpp[name]) <= bound * UNIT[torch.float32], name


@pytest.mark.parametrize("isa", BUILT[1:])
def test_numeric_goals_of_every_instruction_set(isa):
    """All other tests run the best instruction set; the others must be as accurate."""
    environment = {**os.environ, "LORA_MOE_BACKEND": "cpp", "LORA_MOE_ISA": isa}
    selected = ["tests/public/test_functional.py", "-k", "test_routed_lora and not float64"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *selected]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.skipif(lora_moe.backend_info()["serving"]["cpu"] != "cpp", reason="of the C++ backend")
def test_offsets_beyond_two_to_the_31():
    """Rows so far apart that int32 offsets would wrap; the memory between them is never touched."""
    case = BY_NAME["tiles fit"]
    v = sample(case, torch.bfloat16)
    stride, rows = 2**30 + 24, 4
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling would touch all 8 GiB
    try:
        far = torch.empty(stride * (rows - 1) + case.D_in, dtype=torch.bfloat16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    x = far.as_strided((rows, case.D_in), (stride, 1))
    x.copy_(v["x"][:rows])

    def run(x):
        leaf = v["lora_A"].clone().requires_grad_()
        y, _ = F.routed_lora(
            x, v["router_weight"], leaf, v["lora_B"], case.K, rank_offsets=case.ranks
        )
        return y, *torch.autograd.grad(y.sum(), leaf)

    for got, want in zip(run(x), run(v["x"][:rows]), strict=True):
        assert torch.equal(got, want)


def test_fork_after_use():
    case = BY_NAME["long"]
    v = sample(case)
    args = v["x"], v["router_weight"], v["lora_A"], v["lora_B"], case.K
    want, _ = F.routed_lora(*args, rank_offsets=case.ranks)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # required by PyTorch: OpenMP's threads do not survive a fork
        y, _ = F.routed_lora(*args, rank_offsets=case.ranks)
        os._exit(0 if torch.equal(y, want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
