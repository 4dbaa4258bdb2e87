"""Collected only by `make test-vllm`, which sets LORA_MOE_VLLM; see tests/conftest.py."""

import os

import pytest

from . import engine, models

os.environ.update(engine.ENVIRONMENT)  # before vLLM is imported


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a tiny Llama with a tokenizer."""
    return models.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def every_kind(base, tmp_path_factory):
    """An adapter in which each layer has a different kind of configuration."""
    return models.save_adapter(base, tmp_path_factory.mktemp("adapter"), models.KINDS)
