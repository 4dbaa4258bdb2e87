"""Packages for the tests: separate environments, a separate checkout, and wheels and sdists built from it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
SHIPPED = (
    "setup.py",
    "setup_cuda.py",
    "pyproject.toml",
    "LICENSE",
    "README.md",
    "lora_moe",
    "triton_kernels",
)

# what a user's first lines do; it passes whichever backend serves
FIRST_STEPS = """
import torch, lora_moe
y, routing = lora_moe.functional.routed_lora(
    torch.ones(3, 8), torch.eye(4, 8), torch.ones(8, 8), torch.ones(8, 5), 2, rank_offsets=2
)
assert torch.allclose(y, torch.full((3, 5), 16.0)), y
print(lora_moe.__file__)
"""
NO_TRITON = "import sys; sys.modules['triton'] = None\n"


def run(command, *, cwd, check=True, **environment):
    """Runs a command without our environment variables, except those given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORA_MOE_", "TRITON_"))}
    kept.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {k: str(v) for k, v in environment.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def make_venv(folder) -> Path:
    """Creates an environment that sees our dependencies but no .pth files, so no editable install of ours."""
    venv.create(folder)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    return folder / "bin/python"


def copy_checkout(folder) -> Path:
    """Copies the sources without compiled files, and with empty C++ kernels, which compile quickly."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_not_built.json")
    folder.mkdir(exist_ok=True)
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder)
    (folder / "csrc/cpu").mkdir(parents=True)
    for name in ("module.cpp", "register.h", "tensors.h", "cpu/register.h"):
        shutil.copy(ROOT / "csrc" / name, folder / "csrc" / name)
    declared = (ROOT / "csrc/cpu/register.h").read_text()
    empty = re.sub(r"^(void register_\w+\(Library&\));", r"\1 {}", declared, flags=re.MULTILINE)
    (folder / "csrc/cpu/no_operators.cpp").write_text(empty)
    return folder


def build_wheel(checkout, out, **environment):
    shutil.rmtree(checkout / "build", ignore_errors=True)  # setuptools packs what it finds there
    command = [*PIP, "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", out, "."]
    done = run(command, cwd=checkout, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout + done.stderr
