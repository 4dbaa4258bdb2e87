"""The mutation runner: it makes the intended mutants, and its verdicts match the tests' results."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from . import cpp_source, python_source, suites, survivors
from .mutants import sample
from .suites import LANGUAGES, ROOT, sources
from .workspace import Workspace

PYTHON = b'''"""A docstring with 1 < 2."""
def kernel(x_ptr, stride_xt, stride_xd, T: 3, BLOCK: int = 16):
    t = tl.program_id(0).to(tl.int64) * BLOCK
    x = tl.load(x_ptr + t * stride_xt, mask=t < T, other=0.0)
    if x is not None and not t >= T:
        raise ValueError(f"T: expected {T + 1}, got " + str(T))
    return min(x, 1)
'''
WANTED = {
    "constant": "t = tl.program_id(1).to(tl.int64) * BLOCK",
    "cast": "t = tl.program_id(0) * BLOCK",
    "stride": "x = tl.load(x_ptr + t * stride_xd, mask=t < T, other=0.0)",
    "argument": "x = tl.load(x_ptr + t * stride_xt, other=0.0)",
    "compare": "x = tl.load(x_ptr + t * stride_xt, mask=t <= T, other=0.0)",
    "arithmetic": "x = tl.load(x_ptr - t * stride_xt, mask=t < T, other=0.0)",
    "logic": "if x is not None or not t >= T:",
    "statement": "pass",
    "bound": "return max(x, 1)",
}


def after(mutant):
    return mutant.name.split(" -> ")[1]


@pytest.mark.parametrize("kind", WANTED)
def test_python_mutants(kind):
    found = python_source.mutants("k.py", PYTHON)
    assert WANTED[kind] in {after(m) for m in found if m.kind == kind}


def test_python_mutants_leave_texts_and_annotations_and_all_are_python():
    found = python_source.mutants("k.py", PYTHON)
    for mutant in found:
        new = mutant.apply(PYTHON)
        ast.parse(new)
        assert new != PYTHON and mutant.line not in (1,)
        assert (b"T: 3" in new and b"{T + 1}, got " in new) or mutant.kind == "statement"
    assert len({m.name for m in found}) == len(found)


CPP = b"""#include <algorithm>
#include <cstdio>
#if LEFT_OUT
int other(int n) { return n + 7; }
#endif
constexpr int kSize = 3 + 1;
template <int N> int twice(int n) { return N * n; }
int work(int n) {
  int sum = 0;  // a comment with 1 < 2
  for (int i = 0; i < n; ++i) {
    sum += twice<2>(i) *
           // in the middle
           std::max(i, 1);
  }
  if (!(sum > 5) || n == 2) std::printf("");
  return sum > 5 ? sum : -sum;
}
int main(int, char** v) { std::printf("%d", work(v[1][0] - '0')); }
"""


@pytest.fixture
def cpp(tmp_path):
    """Compiles a source and returns what the program prints for an argument and a mutant."""
    pytest.importorskip("tree_sitter_cpp", reason="make mutate installs it")

    def build(source):
        (tmp_path / "switch.h").write_text(cpp_source.SWITCH)
        (tmp_path / "x.cpp").write_bytes(source)
        command = ["g++", "-std=c++20", "-w", "-include", "switch.h", "x.cpp", "-o", "x"]
        subprocess.run(command, cwd=tmp_path, check=True)

        def run(argument, mutant=0):
            environment = {"LORA_MOE_MUTANT": str(mutant)}
            command = [tmp_path / "x", str(argument)]
            return subprocess.run(command, env=environment, capture_output=True, text=True).stdout

        return run

    return build


def test_cpp_mutants_in_one_build(cpp):
    """Each alone is what its own source would be, and none is the original."""
    found = [m for m in cpp_source.mutants("x.cpp", CPP) if "n + 7" not in m.name]
    assert {m.kind for m in found} >= {
        "compare",
        "arithmetic",
        "logic",
        "constant",
        "bound",
        "statement",
    }
    assert not any("kSize" in m.name or "twice<3>" in m.name for m in found)  # constants
    chosen = dict(enumerate(found, 1))
    together = cpp(cpp_source.instrumented(CPP, chosen))
    original = together(4)
    changed = 0
    for number, mutant in chosen.items():
        if (
            "++i" in mutant.name
            and "-> for (int i = 0;" in mutant.name
            and "i < n" not in after(mutant)
        ):
            continue  # may run for very long
        alone = cpp(mutant.apply(CPP))
        assert together(4, number) == alone(4), mutant.name
        changed += alone(4) != original
    assert changed > 5


def test_cpp_instrumentation_adds_no_line():
    pytest.importorskip("tree_sitter_cpp", reason="make mutate installs it")
    for file in sources("cpp"):
        source = (ROOT / file).read_bytes()
        found = cpp_source.mutants(file, source)
        assert cpp_source.instrumented(source, {}) == source
        assert cpp_source.instrumented(source, dict(enumerate(found, 1))).count(
            b"\n"
        ) == source.count(b"\n")


def test_samples_are_fixed_by_their_seed():
    found = python_source.mutants("k.py", PYTHON)
    assert sample(found, 5, 1) == sample(found[::-1], 5, 1) != sample(found, 5, 2)
    assert len(sample(found, 10**6, 1)) == len(found)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_source_has_tests_that_watch_it(language):
    assert len(sources(language)) > 5
    for file in sources(language):
        assert suites.tests_of(file)


def test_survivors_have_reasons_and_are_still_in_the_sources():
    for name in survivors.read():
        file, old = name.split(" -> ")[0].split(": ", 1)
        lines = {" ".join(line.split()) for line in (ROOT / file).read_text().splitlines()}
        assert old in lines or any(old in " ".join(lines_) for lines_ in [sorted(lines)]), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.py: 1 -> 2\n", "expected a reason"),
        ("a.py: 1 -> 2\n  r\na.py: 1 -> 2\n  r\n", "each mutant once"),
        ("  r\n", "a mutant before its reason"),
    ],
)
def test_a_list_of_survivors_that_says_too_little(tmp_path, text, message):
    (tmp_path / "s.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        survivors.read(tmp_path / "s.txt")


# --- verdicts ------------------------------------------------------------------------------------

FAKE = """
import time, os, signal
from lora_moe import value

def test_first():
    assert True

def test_second():
    if value.N == 3:
        while True: time.sleep(1)
    if value.N == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    assert value.M == 2

def test_third():
    assert value.M == 2 and value.N == 2
"""


@pytest.fixture
def space(tmp_path, monkeypatch):
    """A workspace of a checkout of two files."""
    root = tmp_path / "root"
    (root / "lora_moe").mkdir(parents=True)
    (root / "lora_moe/__init__.py").touch()
    (root / "lora_moe/value.py").write_text("M = 2\nN = 2\nK = 2\n")
    (root / "tests/mutation").mkdir(parents=True)
    (root / "tests/public").mkdir()
    (root / "tests/public/test_value.py").write_text(FAKE)
    for name in ("__init__.py", "public/__init__.py", "mutation/__init__.py", "mutation/order.py"):
        (root / "tests" / name).write_text((ROOT / "tests" / name).read_text())
    monkeypatch.setattr("tests.mutation.workspace.ROOT", root)
    monkeypatch.setattr("tests.mutation.suites.ROOT", root)
    return Workspace(tmp_path / "space/python", "python", "portable", 20)


def verdicts(space):
    source = (space.folder / "lora_moe/value.py").read_bytes()
    found = python_source.mutants("lora_moe/value.py", source)
    return {after(m): space.judge(m) for m in found}


def test_verdicts(space):
    assert not space.judge(None, tests=["tests/public/test_value.py"]).killed
    found = verdicts(space)
    assert found["M = 3"].by == found["M = 1"].by == "tests/public/test_value.py::test_second"
    assert found["N = 3"].by == "timeout" and found["N = 1"].by == "status -11"
    assert not found["K = 1"].killed and not found["K = 3"].killed
    assert (space.folder / "lora_moe/value.py").read_text() == "M = 2\nN = 2\nK = 2\n"


def test_the_last_killers_run_first(space):
    space.killers = {"lora_moe/value.py": ["tests/public/test_value.py::test_third"]}
    assert verdicts(space)["M = 3"].by == "tests/public/test_value.py::test_third"
    again = Workspace(space.folder, "python", "portable", 20)
    assert again.killers["lora_moe/value.py"][0] == "tests/public/test_value.py::test_third"


def test_failing_without_a_mutant_is_told(space):
    (space.folder / "lora_moe/value.py").write_text("M = N = K = 5\n")
    verdict = space.judge(None, tests=["tests/public/test_value.py"])
    assert verdict.killed and "value.M == 2" in verdict.by


def test_a_wrong_language_is_refused():
    command = [sys.executable, "-m", "tests.mutation", "fortran"]
    done = subprocess.run(command, cwd=Path(ROOT), capture_output=True, text=True)
    assert (
        done.returncode == 2 and "expected some of cpp, triton, python, got fortran" in done.stderr
    )
