"""Resets once-per-process warnings before each test."""

import pytest

from lora_moe import notices


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(notices, "told", set())
