"""Which sources are mutated, and which tests should detect it: the mirrored test file first.

A table of exceptions; without an entry, the tests of lora_moe/x.py are test_x.py and test_x_*.py of
GROUPS, and COMMON.
Mutants that pass these go to more tests: for kernels those in MORE, for a module those that name what it
defines.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GROUPS = ("public", "kernels", "stack", "tools")


def _of(folder: str, names: str) -> tuple[str, ...]:
    return tuple(f"tests/{folder}/test_{name}.py" for name in names.split())


COMMON = _of("public", "functional routing top_k exactness layers layer_features")
BLACK_BOX = _of("public", "functional routing top_k exactness errors ops ops_arguments")
FUZZ = ("tests/fuzz",)
FILES = (*_of("public", "safefile safefile_writing io io_refusals"), *FUZZ)
NATIVE = _of("stack", "native_experts native_training native_refusals")
TESTS = {
    "lora_moe/backend.py": (*_of("kernels", "backends"), *_of("tools", "missing_operators")),
    "lora_moe/missing_operators.py": _of("tools", "missing_operators packaging"),
    "lora_moe/cli.py": _of("tools", "cli"),
    "lora_moe/doctor.py": _of("tools", "cli"),
    "lora_moe/opening.py": FILES,
    "lora_moe/replace.py": FILES,
    "lora_moe/safefile.py": FILES,
    "lora_moe/io.py": FILES[2:],
    "lora_moe/methods/branch_lora": (
        *_of("methods", "branch_lora branch_lora_tasks branch_lora_models branch_lora_files"),
        *FUZZ,
    ),
    "lora_moe/methods/c_lorae": _of("methods", "c_lorae c_lorae_losses c_lorae_t5 visual"),
    "lora_moe/methods/mmolre": _of("methods", "mmolre mmolre_model affect"),
    "lora_moe/routers": (
        *_of("public", "routers"),
        *_of("methods/presets", "parts formulas"),
        *_of("stack", "routers"),
    ),
    "lora_moe/ffn_targets.py": (*_of("public", "mlp mlp_forms"), *_of("stack", "ffn")),
    "lora_moe/grouped.py": NATIVE,
    "lora_moe/conditions.py": _of("public", "forwards"),
    "lora_moe/interleave.py": _of("stack", "threads use_routing use_routing_recompute"),
    "lora_moe/losses.py": (*_of("public", "losses aux_loss"), *COMMON),
    "lora_moe/mergeable.py": _of("public", "merging merging_loras"),
    "lora_moe/placement.py": (*COMMON, *_of("public", "mlp mlp_forms"), *NATIVE),
    "lora_moe/usage_warnings.py": (
        *_of("public", "monitor inject"),
        *_of("stack", "padding forwards_of_a_step"),
    ),
    "csrc/cpu": (*BLACK_BOX, *_of("public", "layers layer_features")),
    "triton_kernels": (
        *_of("kernels", "triton_kernels triton_bits triton_arguments plan no_host_sync"),
        *BLACK_BOX,
    ),
}
MORE = {
    "csrc/cpu": (
        *_of("public", "slots gradients"),
        *_of("kernels", "sweep"),
        *_of("public", "banks frozen"),
        *_of("kernels", "quick_path token_counts"),
        *_of("public", "mlp mlp_forms"),
        *_of("fuzz", "operators"),
    ),
    "triton_kernels": (
        *_of(
            "kernels",
            "triton_launching triton_numerics triton_sort triton_tiles triton_compile",
        ),
        *_of("public", "slots banks gradients frozen"),
        *_of("fuzz", "operators"),
    ),
}
NAMING = 12  # number of test files that name a module's definitions most often


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
    """The existing test files for a source file, the most specific first."""
    path = Path(file)
    mirror = [test for group in GROUPS for test in _mirror(group, path.stem)]
    listed = TESTS.get(file) or TESTS.get(str(path.parent)) or (*mirror, *COMMON)
    found = [test for test in dict.fromkeys(listed) if (ROOT / test).exists()]
    if not found:
        raise ValueError(f"{file}: expected tests that watch it, got {listed}")
    return found


def _mirror(group, stem):
    """test_x.py, then test_x_*.py."""
    folder = ROOT / "tests" / group
    found = [folder / f"test_{stem}.py", *sorted(folder.glob(f"test_{stem}_*.py"))]
    return [str(path.relative_to(ROOT)) for path in found]


def more_tests_of(file: str) -> list[str]:
    """Further test files, for mutants that survive those of tests_of."""
    folder = str(Path(file).parent)
    listed = MORE.get(folder) or _naming(file)
    return [t for t in listed if t not in tests_of(file) and (ROOT / t).exists()]


def _naming(file):
    """Test files that name definitions of a module, ordered by how often they do."""
    defined = [
        node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")
    ]
    stem = Path(file).stem
    modules = [rf"import {stem}\b", rf"\.{stem} import", rf"\b{stem}\."]
    pattern = re.compile("|".join([*modules, *(rf"\b{name}\b" for name in defined)]))
    tests = (
        p
        for p in (ROOT / "tests").rglob("test_*.py")
        if not p.is_relative_to(ROOT / "tests/stack/vllm")
    )
    found = {str(p.relative_to(ROOT)): len(pattern.findall(p.read_text())) for p in tests}
    ranked = sorted((t for t in found if found[t]), key=lambda t: -found[t])
    return [t for t in ranked if not t.startswith("tests/mutation")][:NAMING]
