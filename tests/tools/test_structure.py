"""How the sources are built: no circular imports or overridden private names, short files and functions,
and declared dependencies that match the imports.
"""

import ast
import graphlib
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from torch import nn

import lora_moe

ROOT = Path(lora_moe.__file__).parent


def imported_at_the_top(path: Path) -> set[str]:
    """Our modules that this module imports while it is being imported."""
    package = ["lora_moe", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = package[: len(package) - node.level + 1]
        module = ".".join([*above, *(node.module or "").split(".")]).rstrip(".")
        found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def graph():
    names = {}
    for path in ROOT.rglob("*.py"):
        parts = ["lora_moe", *path.relative_to(ROOT).with_suffix("").parts]
        names[".".join(parts).removesuffix(".__init__")] = path
    edges = {name: imported_at_the_top(path) & names.keys() for name, path in names.items()}
    # a package's __init__ runs before any of its modules
    return {
        name: {m for m in found if not f"{name}.".startswith(m + ".")}
        for name, found in edges.items()
    }


def test_imports_form_no_circle():
    edges = graph()
    assert len(edges) > 60 and edges["lora_moe.layers"] >= {"lora_moe.context", "lora_moe.tensors"}
    order = list(graphlib.TopologicalSorter(edges).static_order())  # raises CycleError
    assert order.index("lora_moe.context") < order.index("lora_moe.layers")


def classes() -> dict[str, tuple[set[str], set[str]]]:
    """{class: (bases, methods)} of the package, by bare names."""
    found = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
                functions = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
                found[node.name] = bases, functions
    return found


def test_no_class_overrides_a_private_name_of_another_of_ours():
    known = classes()
    assert len(known) > 60 and "LoraMoeLinear" in known["MoeExperts"][0]
    for name, (bases, functions) in known.items():
        todo, above = list(bases), set()
        while todo:
            further, methods = known.get(todo.pop(), (set(), set()))
            todo += further
            above |= methods
        both = {n for n in functions & above if n.startswith("_") and not n.endswith("__")}
        # torch's private methods, which modules are meant to override
        assert both <= {n for n in vars(nn.Module) if n.startswith("_")}, (name, both)


@pytest.mark.parametrize("name", ["lora_moe.inject", "lora_moe.injection"])
def test_inject_is_a_function_and_no_module(name):
    assert inspect.isfunction(lora_moe.inject)
    found = importlib.util.find_spec(name)
    assert (found is not None) == (name == "lora_moe.injection")


FOLDERS = ("lora_moe", "triton_kernels", "csrc", "benchmarks", "examples", "tests")
SOURCES = [
    path
    for folder in FOLDERS
    for path in (ROOT.parent / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".h", ".cu"}
] + [ROOT.parent / "setup.py"]


def test_no_file_is_longer_than_300_lines():
    lengths = {
        path.relative_to(ROOT.parent).as_posix(): len(path.read_text().splitlines())
        for path in SOURCES
    }
    assert len(lengths) > 300
    assert {path for path, n in lengths.items() if n > 300} == set()


def lines_of(function: ast.FunctionDef) -> int:
    """Lines without the docstring, which lists arguments and errors in public functions."""
    doc = function.body[0] if ast.get_docstring(function, clean=False) else None
    own = doc.end_lineno - doc.lineno + 1 if doc else 0
    return function.end_lineno - function.lineno + 1 - own


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_function_but_a_kernel_is_longer_than_60_lines():
    found, long = 0, []
    for path in SOURCES:
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and not is_kernel(node):
                    found += 1
                    long += [(str(path), node.name)] if lines_of(node) > 60 else []
    assert found > 1000
    assert long == []


# subpackages whose dependencies come with the extra of that name, or with vLLM
OPTIONAL = ("hf", "peft", "vllm")


def packages_imported_at_the_top() -> set[str]:
    """Packages imported by modules that need no extra."""
    found = set()
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] in OPTIONAL:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"lora_moe"}


def test_the_declared_dependencies_are_the_packages_that_are_imported():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    assert packages_imported_at_the_top() == declared


def test_importing_the_package_loads_no_optional_one():
    code = "import sys, torch; before = set(sys.modules); import lora_moe; print(*set(sys.modules) - before)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = os.environ | {"LORA_MOE_BACKEND": "reference"}
    said = subprocess.run(
        command, cwd=ROOT.parent, env=environment, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in said.stdout.split()}
    assert "lora_moe" in loaded
    assert not loaded & {"accelerate", "matplotlib", "peft", "safetensors", "tqdm", "transformers"}
