"""Which sources are mutated, and which tests should detect it: the mirrored test file first.

A table of exceptions; without an entry, the tests of lora_moe/x.py are tests/test_x.py and COMMON.  Mutants
that pass these go to more tests: for kernels those in MORE, for a module those that name what it defines.
"""

from __future__ import annotations

import ast
import re
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
    "lora_moe/routers": (
        *("tests/test_routers.py", "tests/presets/test_parts.py"),
        *("tests/presets/test_formulas.py", "tests/stack/test_routers.py"),
    ),
    "lora_moe/ffn_targets.py": ("tests/test_mlp.py", "tests/stack/test_ffn.py"),
    "lora_moe/grouped.py": ("tests/stack/test_native_experts.py",),
    "lora_moe/conditions.py": ("tests/test_forwards.py",),
    "lora_moe/interleave.py": ("tests/stack/test_threads.py", "tests/stack/test_use_routing.py"),
    "lora_moe/mergeable.py": ("tests/test_merging.py",),
    "lora_moe/placement.py": (*COMMON, "tests/test_mlp.py", "tests/stack/test_native_experts.py"),
    "lora_moe/watch.py": (
        "tests/test_monitor.py",
        "tests/test_inject.py",
        "tests/stack/test_padding.py",
    ),
    "csrc/cpu": (*BLACK_BOX, "tests/test_layers.py"),
    "triton_kernels": (
        *("tests/test_triton_kernels.py", "tests/test_plan.py", "tests/test_no_host_sync.py"),
        *BLACK_BOX,
    ),
}
MORE = {
    "csrc/cpu": (
        *("tests/test_slots.py", "tests/test_gradients.py", "tests/test_sweep.py"),
        *("tests/test_banks.py", "tests/test_frozen.py", "tests/test_quick_path.py"),
        *("tests/test_token_counts.py", "tests/test_mlp.py", "tests/fuzz/test_operators.py"),
    ),
    "triton_kernels": (
        *("tests/test_triton_launching.py", "tests/test_triton_numerics.py"),
        *(
            "tests/test_triton_sort.py",
            "tests/test_triton_tiles.py",
            "tests/test_triton_compile.py",
        ),
        *("tests/test_slots.py", "tests/test_banks.py", "tests/test_gradients.py"),
        *("tests/test_frozen.py", "tests/fuzz/test_operators.py"),
    ),
}
NAMING = 12  # test files that name most of a module


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


def more_tests_of(file: str) -> list[str]:
    """Further ones, for what these accept."""
    folder = str(Path(file).parent)
    listed = MORE.get(folder) or _naming(file)
    return [t for t in listed if t not in tests_of(file) and (ROOT / t).exists()]


def _naming(file):
    """Test files that name what a module defines, those that do so most often first."""
    defined = [
        node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")
    ]
    stem = Path(file).stem
    modules = [rf"import {stem}\b", rf"\.{stem} import", rf"\b{stem}\."]
    pattern = re.compile("|".join([*modules, *(rf"\b{name}\b" for name in defined)]))
    tests = (
        p for p in (ROOT / "tests").rglob("test_*.py") if not p.is_relative_to(ROOT / "tests/vllm")
    )
    found = {str(p.relative_to(ROOT)): len(pattern.findall(p.read_text())) for p in tests}
    ranked = sorted((t for t in found if found[t]), key=lambda t: -found[t])
    return [t for t in ranked if not t.startswith("tests/mutation")][:NAMING]
