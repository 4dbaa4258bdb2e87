"""The scripts accept the commands of docs/published.md, and their help says where defaults come from."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from examples.published import branch_lora, c_lorae, mmolre

PAGE = (Path(__file__).parents[3] / "docs/published.md").read_text()
COMMANDS = re.findall(r"^python -m examples\.published\.(\w+) (.+)$", PAGE, re.MULTILINE)
SCRIPTS = {"branch_lora": branch_lora, "c_lorae": c_lorae, "mmolre": mmolre}


def test_commands_are_accepted():
    assert {name for name, _ in COMMANDS} == SCRIPTS.keys()
    for name, line in COMMANDS:
        assert SCRIPTS[name].arguments(shlex.split(line)).out


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_whether_a_default_is_published(name, capsys):
    with pytest.raises(SystemExit):
        SCRIPTS[name].arguments(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"examples.published.{name}" in told
    assert told.count("(inferred; ") >= 5 and told.count("(published; ") >= 1


def test_defaults_are_those_of_the_papers():
    commands = dict(COMMANDS)
    args = branch_lora.arguments(shlex.split(commands["branch_lora"]))
    assert (args.branches, args.rank, args.top_k, args.alpha) == (8, 16, 2, 256.0)
    assert args.batch_size * args.accumulate == 96 and args.epochs == 1
    order = "ScienceQA TextVQA ImageNet GQA VizWiz Grounding VQAv2 OCRVQA"
    assert " ".join(args.tasks) == order
    args = mmolre.arguments(shlex.split(commands["mmolre"]))
    assert (args.width, args.blocks, args.modalities) == (768, 2, ["text", "audio"])
