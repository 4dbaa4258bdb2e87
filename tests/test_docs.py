"""Every page's Python runs as printed, one block after another, and all links resolve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lora_moe import notices

DOCS = Path(__file__).parent.parent / "docs"
PAGES = (
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
        exec(compile(block, page, "exec", dont_inherit=True), scope)
    torch._dynamo.reset()


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
