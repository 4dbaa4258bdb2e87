"""lora-moe info, inspect and doctor."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lora_moe import LoraMoeConfig, cli, doctor, inject, save_adapter


@pytest.mark.parametrize("command", ["info", "inspect", "convert", "doctor", "bench"])
def test_help_of_every_command(command, capsys):
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        assert command in capsys.readouterr().out


def test_help_names_every_format(capsys):
    from lora_moe.convert import FORMATS

    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    said = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", said) for name in FORMATS)


def test_info_names_every_backend_and_a_reason(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    for name, state in cli.backend_info()["backends"].items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {name} ")]
        assert f" {'yes' if state['available'] else 'no'}" in line
        assert state["reason"] in line


def test_inspect_shows_config_and_tensors(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(6, 5))
    inject(model, LoraMoeConfig(num_experts=3, r=2, target_modules=("0",)))
    save_adapter(model, tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["num_experts", "3"] in rows
    assert ["0.lora_A", "F32", "(6,", "6)", "36"] in rows
    assert ["all", str(36 + 30 + 18)] in rows


def test_inspect_refuses_other_files(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_control_characters_in_names_are_escaped():
    assert cli._plain("a\x1b[2Jb\n") == r"a\x1b[2Jb\n"


def test_doctor_passes_the_reference(capsys):
    assert cli.main(["doctor", "reference"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:-1]
    assert len(rows) == len(doctor.CHECKS) * len(doctor.LIMITS)
    assert all(row.startswith("reference") and row.endswith("ok") for row in rows)


def test_doctor_fails_if_a_named_backend_is_unavailable(capsys, monkeypatch):
    monkeypatch.setenv("LORA_MOE_ISA", "none")
    assert cli.main(["doctor", "cpp"]) == 1
    assert "unavailable: LORA_MOE_BACKEND=cpp" in capsys.readouterr().out


def test_doctor_reports_a_process_that_breaks(capsys):
    assert cli.main(["doctor", "bogus"]) == 1
    assert "FAIL: ValueError: LORA_MOE_BACKEND" in capsys.readouterr().out


@pytest.mark.parametrize("states", [(True, False), (False, True), (None, True), (True, None)])
@pytest.mark.parametrize("named", [True, False])
def test_doctor_ends_with_1_if_one_of_several_fails(monkeypatch, states, named):
    """An unavailable backend, for which _examine returns None, fails only if it was named."""
    found = dict(zip(cli.BACKENDS, [*states, *[True] * len(cli.BACKENDS)]))
    monkeypatch.setattr(cli, "_examine", found.get)
    failed = False in states or (named and None in states)
    assert cli.main(["doctor", *cli.BACKENDS] if named else ["doctor"]) == failed


def test_doctor_examines_this_package_from_any_folder(tmp_path, monkeypatch, capsys):
    """A package of that name in the current folder is ignored."""
    (tmp_path / "lora_moe").mkdir()
    (tmp_path / "lora_moe/__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "reference"]) == 0
    assert "FAIL" not in capsys.readouterr().out


def test_doctor_reports_a_row_beyond_its_limit(capsys):
    assert cli._print_check("cpp", "shared A", "float32", 0.5, 17.0, 16.0) is False
    assert cli._print_check("cpp", "shared A", "float32", float("inf"), 1.0, 16.0) is False
    assert capsys.readouterr().out.count("FAIL") == 2


def scaled(outputs, inputs):
    return [outputs[0] * 1.01, *outputs[1:]]


def zero(outputs, inputs):
    return [outputs[0] * 0, *outputs[1:]]


def not_a_number(outputs, inputs):
    return [outputs[0] * float("nan"), *outputs[1:]]


def last_column_dropped(outputs, inputs):
    return [outputs[0] * (torch.arange(doctor.D_OUT) < doctor.D_OUT - 1), *outputs[1:]]


def last_token_dropped(outputs, inputs):
    return [outputs[0] * (torch.arange(doctor.T) < doctor.T - 1)[:, None], *outputs[1:]]


def gradient_lost(outputs, inputs):
    inputs[2].register_hook(torch.zeros_like)
    return outputs


WRONG = (scaled, zero, not_a_number, last_column_dropped, last_token_dropped, gradient_lost)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_doctor_rejects_wrong_results(monkeypatch, wrong, dtype):
    name, honest = "softmax router", doctor.public_function
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name]})
    (right,) = doctor.run("cpu", [dtype])
    assert max(right[2:4]) <= right[4]
    monkeypatch.setattr(doctor, "public_function", lambda c, *t: wrong(honest(c, *t), t))
    (result,) = doctor.run("cpu", [dtype])
    assert max(result[2:4]) > result[4]
