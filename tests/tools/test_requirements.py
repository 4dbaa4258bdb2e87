"""Every package pinned in a requirements file has its hashes; `make check-hashes` compares downloads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "requirements"
OURS = {"torch", "deepspeed"}  # the user chooses torch's build; deepspeed has sources only
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s\\;]+)", re.M)


def pins(text) -> dict[str, str]:
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in PIN.findall(text)}


HASHES = (FOLDER / "hashes.txt").read_text()
FILES = sorted(path for path in FOLDER.glob("*.txt") if path.name != "hashes.txt")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_pin_has_its_hash(path):
    hashed = pins(HASHES)
    for name, version in pins(path.read_text()).items():
        assert name in OURS or hashed.get(name) == version, f"{path.name}: {name}=={version}"


def test_every_name_is_pinned():
    """In the requirements file or in the constraints that it includes."""
    for path in FILES:
        text = path.read_text()
        pinned = pins(text) | (
            pins((FOLDER / "constraints.txt").read_text()) if "-c " in text else {}
        )
        for line in text.splitlines():
            name = re.match(r"[A-Za-z0-9._-]+", line)
            if name and not line.startswith(("-", "#")):
                assert re.sub("[-_.]+", "-", name[0]).lower() in pinned, f"{path.name}: {line}"


def test_every_hash_is_used_and_strong():
    used = set().union(*(pins(path.read_text()) for path in FILES))
    assert pins(HASHES).keys() <= used - OURS
    for block in re.split(r"\n(?=\S)", HASHES.strip()):
        if not block.startswith("#"):
            assert re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block), block
            assert "md5" not in block and "sha1:" not in block
