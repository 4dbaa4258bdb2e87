"""python -m tests.fuzz.tsan: threaded calls of the C++ operators under ThreadSanitizer.

OpenMP's joins use futexes that the sanitizer cannot see, so every join would look like a race.  In this
build, at::parallel_for is replaced by std::thread, whose joins it sees; nothing else changes.  Python
and torch are not instrumented and are ignored.  A second run has a planted race, which must be found.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADER = """#pragma once
#include <torch/csrc/stable/ops.h>
#include <thread>
#include <vector>
namespace torch::stable {
template <class F>
void parallel_for_threads(int64_t begin, int64_t end, int64_t, const F& f) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back([&] { f(begin, end); });
  for (auto& thread : threads) thread.join();
}
}  // namespace torch::stable
#define parallel_for parallel_for_threads
"""
# each thread of for_tasks takes the next task; with the planted race two may take the same one
PLANTED = ("f(i);", "f(i & ~int64_t(1));")
CALLS = """
import torch
from tests.support.cases import Case
from tests.fuzz.test_processes import same, step
for case in (Case("many tokens", 700, 8, 2, 8, 256, 160), Case("few tokens", 20, 8, 2, 16, 700, 900),
             Case("shared A", 400, 8, 2, 16, 256, 160, shared_a=True),
             Case("unequal", 300, 4, 3, (1, 24, 7, 40), 200, 130, gate="sigmoid", with_bias=True)):
    step(case)
print("ran")
"""


def build(folder: Path, planted: bool) -> None:
    shutil.rmtree(folder / "csrc", ignore_errors=True)
    ignore = shutil.ignore_patterns(".*", "build", "*.so", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignore, dirs_exist_ok=True)
    (folder / "csrc/threads.h").write_text(HEADER)
    if planted:
        path = folder / "csrc/cpu/tensors.h"
        text = path.read_text()
        if text.count(PLANTED[0]) != 1:
            raise RuntimeError(
                f"{path}: expected {PLANTED[0]!r} once; plant the race where it went"
            )
        path.write_text(text.replace(*PLANTED))
    environment = {
        "CXXFLAGS": f"-fsanitize=thread -g1 -w -include {folder}/csrc/threads.h",
        "LDFLAGS": "-fsanitize=thread",
        "LORA_MOE_BUILD_ISA": "portable",
        "LORA_MOE_SKIP_EXT": "0",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=os.environ | environment, check=True)


def races(folder: Path) -> int:
    """Number of races that the sanitizer reports in calls of every operator."""
    compiler = os.environ.get("CXX") or "g++"
    library = subprocess.run(
        [compiler, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {
        "LD_PRELOAD": library,
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=0 exitcode=0",
        "LORA_MOE_BACKEND": "cpp",
        "LORA_MOE_ISA": "portable",
        "PYTHONPATH": str(folder),
    }
    command = [sys.executable, "-W", "ignore", "-c", CALLS]
    if shutil.which("setarch"):  # newer kernels place memory where the sanitizer does not expect it
        command = ["setarch", platform.machine(), "-R", *command]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.stdout != "ran\n":
        raise RuntimeError(f"the calls did not run under ThreadSanitizer:\n{done.stderr[-3000:]}")
    sys.stderr.write(done.stderr[:6000])
    return done.stderr.count("WARNING: ThreadSanitizer: data race")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.tsan")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/tsan")
    args = parser.parse_args(argv)
    folder = args.folder.resolve()
    build(folder, planted=False)
    found = races(folder)
    print(f"races in the C++ operators: {found}")
    build(folder, planted=True)
    planted = races(folder)
    print(f"with a race planted: {planted}")
    return 0 if not found and planted else 1


if __name__ == "__main__":
    raise SystemExit(main())
