"""A copy of the checkout whose sources may be broken, and the verdict on one mutant."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import NamedTuple

from . import cpp_source
from .mutants import Mutant
from .suites import LANGUAGES, ROOT, more_tests_of, tests_of

VECTORS = ("compare", "logic")  # kinds of mutants, in a header, at which GCC 12 may crash
LEFT_OUT = (".*", "build", "dist", "__pycache__", "*.egg-info")


class Verdict(NamedTuple):
    killed: bool
    by: str  # a test's id, or how the run ended
    seconds: float


class Workspace:
    """Judges mutants of one language, one after another.

    Args:
        folder: emptied first, except for compiled objects.
        language: a key of LANGUAGES.
        isa: instruction set of the C++ build.
    """

    def __init__(self, folder: Path, language: str, isa: str, timeout: float):
        self.folder, self.language, self.isa, self.timeout = folder, language, isa, timeout
        self.worker: subprocess.Popen | None = None
        self.memory = folder.parent / f"killers_{language}.json"
        self.killers: dict[str, list[str]] = (
            json.loads(self.memory.read_text()) if self.memory.exists() else {}
        )
        for name in os.listdir(folder) if folder.exists() else ():
            if name != "build":
                path = folder / name
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        ignore = shutil.ignore_patterns(*LEFT_OUT, *(["*.so"] if language == "cpp" else []))
        shutil.copytree(ROOT, folder, ignore=ignore, dirs_exist_ok=True)

    # --- C++: all mutants in one build ---------------------------------------------------------------

    def build(self, wanted: list[Mutant], spare: list[Mutant]) -> dict[int, Mutant]:
        """Builds as many mutants as are wanted; one that does not compile, or is in no kernel of this
        instruction set, gives way to a spare one.
        """
        chosen = dict(enumerate(wanted, 1))
        spare, number = list(spare), len(wanted)
        while True:
            self._instrument(chosen)
            errors = self._compile() or self._absent(chosen)
            if not errors:
                return chosen
            bad = [n for n, m in chosen.items() if n in errors or (m.file, m.line) in errors]
            if not bad and self.crashed:  # usually in inlined vector comparisons
                bad = [n for n, m in chosen.items() if m.file.endswith(".h") and m.kind in VECTORS]
            if not bad:
                raise RuntimeError(f"no mutant is to blame for {sorted(errors, key=str)[:5]}")
            for n in bad:
                del chosen[n]
                if spare:
                    number += 1
                    chosen[number] = spare.pop(0)

    def _instrument(self, chosen):
        (self.folder / "csrc/mutant.h").write_text(cpp_source.SWITCH)
        for file in (str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").iterdir()):
            here = {n: m for n, m in chosen.items() if m.file == file}
            new = cpp_source.instrumented((ROOT / file).read_bytes(), here)
            if (self.folder / file).read_bytes() != new:
                (self.folder / file).write_bytes(new)

    def _compile(self):
        """{(file, line)} of the compiler errors; lines are those of the original source."""
        environment = {
            "CXXFLAGS": f"-include {self.folder}/csrc/mutant.h -w",
            "LORA_MOE_BUILD_ISA": self.isa,
            "LORA_MOE_SKIP_EXT": "0",
        }
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(
            command, cwd=self.folder, env=os.environ | environment, capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        # also where a template was made or an inline function called, if the error is in a header
        places = re.findall(r"(csrc/cpu/[\w.]+):(\d+):\d+:\s+(?:error|required from)", said)
        errors = {(file, int(line)) for file, line in places}
        self.crashed = crashes = re.findall(
            r"(csrc/cpu/[\w.]+):(\d+):\d+: internal compiler error", said
        )
        for file, line in crashes:
            errors |= {(file, n) for n in self._function_at(file, int(line))}
        if done.returncode and not errors:
            raise RuntimeError(f"the C++ build failed:\n{said[-3000:]}")
        return errors if done.returncode else set()

    def _function_at(self, file, line):
        """Lines of the function that starts here: a compiler crash only reports its beginning."""
        lines = (ROOT / file).read_text().splitlines()[line - 1 :]
        indent = len(lines[0]) - len(lines[0].lstrip())
        last = next((n for n, text in enumerate(lines) if text == " " * indent + "}"), 0)
        return range(line, line + last + 1)

    def _absent(self, chosen):
        """Numbers of mutants that the preprocessor removed: code for another instruction set."""
        command = [os.environ.get("CXX") or "g++", "-E", "-P", *self._flags()]
        seen = set()
        for source in sorted((self.folder / "csrc/cpu").glob("*.cpp")):
            done = subprocess.run([*command, source], capture_output=True, text=True, check=True)
            seen |= set(map(int, re.findall(r"lora_moe_mutant [!=]= (\d+)", done.stdout)))
        return chosen.keys() - seen

    def _flags(self):
        code = (
            f"import json, setup; e = setup.extension({self.isa!r});"
            "print(json.dumps([e.extra_compile_args, e.include_dirs]))"
        )
        command = [sys.executable, "-c", code, "-q", "--version"]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True)
        arguments, folders = json.loads(done.stdout.splitlines()[-1])
        python = Path(sys.base_prefix, "include", f"python3.{sys.version_info[1]}")
        return [*arguments, *(f"-I{folder}" for folder in (*folders, python))]

    # --- verdicts ---------------------------------------------------------------------------------

    def judge(self, mutant: Mutant | None, number: int = 0, tests=()) -> Verdict:
        """The tests' verdict on the mutant, or on the unchanged sources if it is None."""
        if mutant is None:
            return self._run(mutant, tests)
        if self.language == "cpp":
            return self._ask(mutant, number, tests)
        path = self.folder / mutant.file
        whole = path.read_bytes()
        path.write_bytes(mutant.apply(whole))
        try:
            return self._ask(mutant, number, tests)
        finally:
            path.write_bytes(whole)

    def _ask(self, mutant, number, tests):
        verdict = self._run(mutant, tests or tests_of(mutant.file), number)
        more = () if tests or verdict.killed else more_tests_of(mutant.file)
        if not more:
            return verdict
        second = self._run(mutant, more, number)
        late = second.by == "timeout"  # with many tests, a timeout says nothing about the mutant
        return second._replace(
            killed=second.killed and not late, seconds=verdict.seconds + second.seconds
        )

    def _run(self, mutant, tests, number=0):
        report = self.folder / "first_failure"
        report.unlink(missing_ok=True)
        environment = os.environ | LANGUAGES[self.language].environment
        environment |= {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"LORA_MOE_KILLERS": json.dumps(self._likely(mutant))}
        environment |= {"LORA_MOE_REPORT": str(report), "LORA_MOE_MUTANT": str(number)}
        if self.language == "cpp":
            environment |= {"LORA_MOE_ISA": self.isa}
        arguments = ["-q", "-x", "-p", "no:cacheprovider", "-p", "tests.mutation.order"]
        arguments += ["--deselect", "tests/mutation", *tests]
        start = time.monotonic()
        status, said = self._pytest(arguments, environment)
        seconds = time.monotonic() - start
        if status is None:
            return Verdict(True, "timeout", seconds)
        if status == 0:
            return Verdict(False, "", seconds)
        if status > 3:  # pytest itself had nothing to run
            raise RuntimeError(f"pytest ended with status {status}:\n{said[-2000:]}")
        by = report.read_text() if report.exists() else f"status {status}"
        if mutant is not None and "::" in by:
            self._remember(mutant, by)
        return Verdict(True, by if mutant else said[-3000:], seconds)

    def _pytest(self, arguments, environment):
        """(exit status or None after a timeout, output) of pytest."""
        output = self.folder / "output"
        request = {"arguments": arguments, "environment": environment}
        request |= {"folder": str(self.folder), "output": str(output)}
        if self.worker is None:
            self.worker = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py"))], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | environment,
            )  # fmt: skip
            weakref.finalize(self, _end, self.worker)
        self.worker.stdin.write(json.dumps(request) + "\n")
        self.worker.stdin.flush()
        child, late = int(self.worker.stdout.readline()), threading.Event()

        def stop():
            late.set()
            os.killpg(child, signal.SIGKILL)

        timer = threading.Timer(self.timeout, stop)
        timer.start()
        status = int(self.worker.stdout.readline())
        timer.cancel()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # processes that the tests left running
        return None if late.is_set() else status, output.read_text(errors="replace")

    def _likely(self, mutant):
        own = self.killers.get(mutant.file, []) if mutant else []
        others = [name for file in self.killers for name in self.killers[file]]
        return list(dict.fromkeys([*own, *others]))

    def _remember(self, mutant, by):
        before = self.killers.get(mutant.file, [])
        self.killers[mutant.file] = [by, *(name for name in before if name != by)][:40]
        self.memory.write_text(json.dumps(self.killers, indent=1))


def _end(worker):
    worker.stdin.close()
    worker.stdout.close()
    worker.wait()
