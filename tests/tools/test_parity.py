"""Our layers beside other packages: loss, dx and gradients agree; the comparison detects differences."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from examples.parity import __main__ as script
from examples.parity.measure import Pair, Side, compare
from examples.parity.packages import FOLDER, PACKAGES, Package

ROOT = Path(__file__).parents[2]
HERE = [(package, pair) for package in PACKAGES if not package.apart for pair in package.pairs]
TABLE = script.TABLE.search((ROOT / "docs/parity.md").read_text())[0].splitlines()[2:]


@pytest.mark.parametrize(("package", "pair"), HERE, ids=[f"{p.name}-{pair}" for p, pair in HERE])
def test_agrees(package, pair):
    pytest.importorskip(package.module)
    found = package.compare(pair)
    assert found.agrees, found
    assert found.bound == {"float64": 1e-10, "float32": 1e-5}[found.dtype] and found.tensors >= 8


def side(scale=1.0, name="w", start=2.0):
    w = torch.full((3,), start, dtype=torch.float64, requires_grad=True)
    return Side(lambda x: scale * (w * x).square().mean(), lambda: {name: w.grad})


def test_differences_are_detected():
    x = torch.ones(2, 3, dtype=torch.float64)
    assert compare(Pair(side(), side(), x)).agrees
    assert not compare(Pair(side(1 + 1e-9), side(), x)).agrees
    assert not compare(Pair(side(float("nan")), side(), x)).agrees
    assert compare(Pair(side(1 + 1e-9), side(), x, bound=1e-8)).agrees
    with pytest.raises(ValueError, match=r"ours of \['w'\], theirs of \['v'\]"):
        compare(Pair(side(), side(name="v"), x))
    with pytest.raises(ValueError, match="not all zero"):  # the comparison would be empty
        compare(Pair(side(start=0.0), side(start=0.0), x))


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setattr(logging, "disable", lambda level: None)
    absent = dataclasses.replace(PACKAGES[0], module="no_such_module")
    script.one(absent)
    found = script.json.loads(capsys.readouterr().out.removeprefix(script.MARK))
    assert "no_such_module" in found["missing"]
    (row,) = script.shown(absent, found)
    assert (
        row[-1]
        == f"not installed: `pip install --no-deps --target {FOLDER}/no_such_module loralib==0.1.2`"
    )
    assert len(row) == len(script.HEAD)


def test_a_process_for_each_package(monkeypatch):
    monkeypatch.chdir(ROOT)
    (row,) = script.rows(PACKAGES[0])
    there = Path(FOLDER, "loralib").is_dir() or not PACKAGES[0].missing()
    assert row[-1].startswith("agree" if there else "not installed")


@pytest.mark.parametrize("package", [p for p in PACKAGES[1:] if p.apart], ids=lambda p: p.name)
def test_agrees_in_a_separate_folder(package, monkeypatch):
    monkeypatch.chdir(ROOT)
    if not Path(FOLDER, package.module).is_dir():
        pytest.skip(package.command)
    for row in script.rows(package):
        assert row[-1].startswith("agree"), row


def test_the_page_shows_every_pair_with_the_named_version():
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in TABLE]
    every = [(package, names) for package in PACKAGES for names in package.pairs.values()]
    assert [tuple(row[:2]) for row in rows] == [names for _, names in every]
    for row, (package, _) in zip(rows, every):
        version = package.needs[0].partition("==")[2]
        assert row[2] == f"{package.name} {version} ({package.by}, {package.license})"
        assert row[-1].startswith("agree"), row


def test_this_environment_pins_the_named_versions():
    pinned = (ROOT / "requirements/constraints.txt").read_text().splitlines()
    assert {need for package in PACKAGES if not package.apart for need in package.needs} <= {
        *pinned
    }


def test_a_table_goes_into_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n\n| ours | theirs |\n| --- | --- |\n| a | b |\n\nafter\n")
    script.put_into(page, "| ours | new |\n")
    assert page.read_text() == "before\n\n| ours | new |\n\nafter\n"
    page.write_text("no table\n")
    with pytest.raises(SystemExit, match="expected one table"):
        script.put_into(page, "")


def test_commands_say_where_a_package_goes():
    apart = Package("a", "b", "c", "d", ("a==1", "e==2"), {})
    assert apart.command == f"pip install --no-deps --target {FOLDER}/b a==1 e==2"
    assert dataclasses.replace(apart, apart=False).command == "pip install a==1 e==2"
