"""No shipped code can run code from a file: no unpickling, no eval, no shell (SECURITY.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    p for folder in ("lora_moe", "triton_kernels") for p in (ROOT / folder).rglob("*.py")
)

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "numpy.load"),
}
# the only reader of pickles, used only by `lora-moe convert`: see test_the_one_reader_of_pickles
PICKLES = ROOT / "lora_moe/convert/pickles.py"
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}


def findings(source: str) -> list[str]:
    """Line and name of each forbidden call or import; reads the syntax tree, so prose is not matched."""
    tree = ast.parse(source)
    names = dict(imported(tree))
    found = [
        f"{line}: import {full}" for full, line in imports(tree) if full.split(".")[0] in MODULES
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func, names)
        if name in CALLS:
            found.append(f"{node.lineno}: {name}()")
        found += [
            f"{node.lineno}: {word.arg}="
            for word in node.keywords
            if word.arg in KEYWORDS and getattr(word.value, "value", True)
        ]
    return found


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno


def imported(tree):
    """The full name of each local name: np -> numpy, load -> torch.load."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname, alias.name) for alias in node.names if alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def dotted(node, names) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_source_runs_no_foreign_code(path):
    found = findings(path.read_text("utf-8"))
    if path == PICKLES:
        assert len(found) == 1 and found[0].endswith(": torch.load()")
    else:
        assert not found


def test_the_one_reader_of_pickles():
    """It runs no code from a file, and only the importers use it."""
    tree = ast.parse(PICKLES.read_text("utf-8"))
    (call,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func, {}) == "torch.load"
    )
    words = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
    assert words["weights_only"] is True and words["mmap"] is True
    users = [path for path in SHIPPED if "pickles import" in path.read_text("utf-8")]
    assert {path.parent.name for path in users} == {"convert"}
    for path in SHIPPED:
        if path.parent.name != "convert" and "convert import " in path.read_text("utf-8"):
            assert path.name == "cli.py", path


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load('adapter.bin')",
        "import torch as t\nt.load('adapter.bin', weights_only=True)",
        "from torch import load\nload('adapter.bin')",
        "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
        "import yaml\nyaml.load(text)",
        "eval('1')",
        "exec(source)",
        "__import__('os')",
        "import os\nos.system('ls')",
        "from os import popen\npopen('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=flag)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_scan_finds_what_is_planted(planted):
    assert findings(planted)


@pytest.mark.parametrize(
    "innocent",
    [
        '"""Never torch.load() a pickle."""',
        "model.eval()",
        "import re\nre.compile('a')",
        "from . import backend\nbackend.load()",
        "import subprocess\nsubprocess.run(['ls'])",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
    ],
)
def test_scan_accepts_harmless_code(innocent):
    assert not findings(innocent)


def test_scan_covers_the_sources():
    assert {"io.py", "cli.py", "backend.py"} <= {path.name for path in SHIPPED}
