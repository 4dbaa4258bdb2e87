"""The package's modules have no circular imports, and no class overrides another class's private name."""

import ast
import graphlib
import importlib
import inspect
from pathlib import Path

import pytest
from torch import nn

import lora_moe

ROOT = Path(lora_moe.__file__).parent


def imported_at_the_top(path: Path) -> set[str]:
    """Modules of ours that a module imports while it is imported itself."""
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
    # a package's own __init__ runs first, whatever of it is imported
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
    """{class: (bases, methods)} of the package, by their names alone."""
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
        # torch's own, which modules are meant to override
        assert both <= {n for n in vars(nn.Module) if n.startswith("_")}, (name, both)


@pytest.mark.parametrize("name", ["lora_moe.inject", "lora_moe.injection"])
def test_inject_is_a_function_and_no_module(name):
    assert inspect.isfunction(lora_moe.inject)
    found = importlib.util.find_spec(name)
    assert (found is not None) == (name == "lora_moe.injection")
