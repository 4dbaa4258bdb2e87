"""Explains in one line why the C++ operators are missing, and which command fixes it.

A failed build does not fail the installation, and pip hides its output, so setup.py writes the reason to a
file in the package.  Other reasons are found by inspecting the files.
"""

from __future__ import annotations

import json
import shlex
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
NOTE = HERE / "_not_built.json"  # {instruction set: reason}; see setup.py


def explain(failures: dict[str, ImportError]) -> str:
    """One line about the instruction sets that could not be imported, best first."""
    isa, error = next(iter(failures.items()))
    reason = " ".join((_broken(isa, error) or _hidden() or _not_built(failures)).split())
    return f"{reason}; {_remedy()}"


def is_broken(failures: dict[str, ImportError]) -> bool:
    """Whether operators were built but cannot be loaded."""
    return bool(_hidden() or any(_broken(isa, error) for isa, error in failures.items()))


def _broken(isa, error):
    """The reason if there is a file that does not load, else None."""
    found = sorted(HERE.glob(f"_C_{isa}.*"))
    ours = [path for path in found if path.name.removeprefix(f"_C_{isa}") in EXTENSION_SUFFIXES]
    if ours:
        return f"{ours[0].name} does not load with torch {torch.__version__} ({error})"
    if found:
        python = f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"
        return f"{found[0].name} was built for another Python than this {python}"
    return None


def _hidden():
    """The reason if the imported package shadows another copy that has operators, else None."""
    if any(HERE.glob("_C_*")):
        return None
    for entry in sys.path:
        folder = Path(entry or ".").resolve() / "lora_moe"
        if folder != HERE and any(folder.glob("_C_*")):
            return f"the sources in {HERE.parent} shadow the installed package in {folder.parent}"
    return None


def _not_built(failures):
    notes = _notes()
    built = [path.name.split(".")[0] for path in sorted(HERE.glob("_C_*"))]
    reason = next((notes[isa] for isa in failures if isa in notes), "")
    why = f" ({reason})" if reason else ""
    if built:  # a slower one may be available
        return f"{', '.join(f'_C_{isa}' for isa in failures)} not built{why}"
    return f"the C++ extension is not built{why}"


def _notes() -> dict[str, str]:
    try:
        notes = json.loads(NOTE.read_text())
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _remedy():
    checkout = HERE.parent if (HERE.parent / "setup.py").exists() else None
    install = "pip install --no-build-isolation"
    if checkout is None:
        return f"run in a checkout: {install} --no-deps --force-reinstall ."
    command = f"{install} --no-deps -e {shlex.quote(str(checkout))}"
    return f"run: {command}" if _hidden() is None else f"leave that folder, or run: {command}"
