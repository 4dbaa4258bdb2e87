"""Notices that a process gives only once are given once per test."""

import pytest

from lora_moe import notices


@pytest.fixture(autouse=True)
def nothing_told_yet(monkeypatch):
    monkeypatch.setattr(notices, "told", set())
