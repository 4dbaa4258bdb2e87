"""The Python blocks of every page run as printed, in order, and all links resolve.

A block whose last line is a comment `# ValueError: message` or `# UserWarning: message` must raise or warn.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import re
from pathlib import Path

import pytest
import torch

from lora_moe import notices

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (
    "getting_started.md",
    "how_it_works.md",
    "troubleshooting.md",
    "continual.md",
    "multimodal.md",
    "own_method.md",
    "layer.md",
    "routing.md",
    "routers.md",
    "losses.md",
    "methods.md",
    "saving.md",
    "torch.md",
    "convert.md",
    "merging.md",
    "peft.md",
    "experts.md",
    "plans.md",
)
SAID = re.compile(r"^# (\w+(?:Error|Warning)): (.*)\n\Z", re.MULTILINE)
PUBLIC = ("lora_moe", "functional", "presets", "routers", "middles", "hf", "methods.mmolre")


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    if page in ("peft.md", "methods.md"):
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notices, "told", set())
    text = (DOCS / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    scope = {"__name__": "__main__"}
    for block in blocks:
        with what_it_says(block):
            exec(compile(block, page, "exec", dont_inherit=True), scope)
    torch._dynamo.reset()


def what_it_says(block):
    said = SAID.search(block)
    if said is None:
        return contextlib.nullcontext()
    kind, message = getattr(builtins, said[1]), re.escape(said[2])
    return (pytest.warns if issubclass(kind, Warning) else pytest.raises)(kind, match=message)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_reference_has_every_public_name(name):
    """Except modules, and names that other pages document."""
    path = "lora_moe" if name == "lora_moe" else f"lora_moe.{name}"
    if name == "hf":
        pytest.importorskip("transformers")
    module = importlib.import_module(path)
    reference = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))
    public = {n for n in module.__all__ if callable(getattr(module, n))}
    assert {f"{path}.{n}" for n in public} <= listed


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
