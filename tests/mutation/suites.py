"""Which sources are mutated, and which tests are there to notice: their mirror first.

A table of exceptions; without a row, the tests of lora_moe/x.py are tests/test_x.py and COMMON.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
COMMON = ("tests/test_functional.py", "tests/test_layers.py")
BLACK_BOX = ("tests/test_functional.py", "tests/test_errors.py", "tests/test_ops.py")
FILES = ("tests/test_safefile.py", "tests/test_io.py", "tests/fuzz")
TESTS = {
    "lora_moe/backend.py": ("tests/test_backends.py", "tests/test_missing.py"),
    "lora_moe/missing.py": ("tests/test_missing.py", "tests/test_packaging.py"),
    "lora_moe/cli.py": ("tests/test_cli.py",),
    "lora_moe/doctor.py": ("tests/test_cli.py",),
    "lora_moe/opening.py": FILES,
    "lora_moe/replace.py": FILES,
    "lora_moe/safefile.py": FILES,
    "lora_moe/io.py": FILES[1:],
    "lora_moe/methods/branch_lora": ("tests/methods/test_branch_lora.py", "tests/fuzz"),
    "lora_moe/methods/c_lorae": ("tests/methods/test_c_lorae.py", "tests/methods/test_visual.py"),
    "lora_moe/methods/mmolre": ("tests/methods/test_mmolre.py", "tests/methods/test_affect.py"),
    "lora_moe/routers": ("tests/test_routers.py", "tests/stack/test_routers.py"),
    "csrc/cpu": (*BLACK_BOX, "tests/test_layers.py"),
    "triton_kernels": (
        *("tests/test_triton_kernels.py", "tests/test_plan.py", "tests/test_no_host_sync.py"),
        *BLACK_BOX,
    ),
}


class Language(NamedTuple):
    sources: tuple[str, ...]  # patterns below the root
    environment: dict[str, str]


LANGUAGES = {
    "cpp": Language(
        ("csrc/cpu/*.cpp", "csrc/cpu/*.h"), {"LORA_MOE_BACKEND": "cpp", "OMP_NUM_THREADS": "2"}
    ),
    "triton": Language(
        ("triton_kernels/*.py",), {"LORA_MOE_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    ),
    "python": Language(
        ("lora_moe/*.py", "lora_moe/routers/*.py", "lora_moe/methods/**/*.py"),
        {"OMP_NUM_THREADS": "1"},
    ),
}


def sources(language: str) -> list[str]:
    found = [p for pattern in LANGUAGES[language].sources for p in ROOT.glob(pattern)]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def tests_of(file: str) -> list[str]:
    """Those that exist, the nearest first."""
    path = Path(file)
    mirror = [str("tests" / path.relative_to(path.parts[0]).with_name(f"test_{path.stem}.py"))]
    listed = TESTS.get(file) or TESTS.get(str(path.parent)) or (*mirror, *COMMON)
    found = [test for test in dict.fromkeys(listed) if (ROOT / test).exists()]
    if not found:
        raise ValueError(f"{file}: expected tests that watch it, got {listed}")
    return found
