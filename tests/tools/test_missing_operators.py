"""The built backends run, or one line gives the reason and the command that fixes it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import sysconfig
import tomllib
import zipfile

import pytest
import torch

from lora_moe import backend, missing_operators

from ..support.packages import NO_TRITON, PIP, ROOT, build_wheel, copy_checkout, make_venv, run

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
REBUILD = "run in a checkout: pip install --no-build-isolation --no-deps --force-reinstall ."
STATE = NO_TRITON + (
    "import json, sys, lora_moe\n"
    "print(json.dumps(lora_moe.backend_info()['backends']['cpp'] | {'file': lora_moe.__file__}))"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return make_venv(tmp_path_factory.mktemp("venv"))


def install(checkout, folder, **environment):
    """A folder for PYTHONPATH that holds the checkout's wheel."""
    folder.mkdir()
    wheel, _ = build_wheel(checkout, folder, **environment)
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def state(python, cwd, **environment):
    """The facts on the C++ backend in a new process, and its standard error."""
    done = run([python, "-c", STATE], cwd=cwd, **environment)
    facts = json.loads(done.stdout)
    assert "\n" not in facts["reason"]
    return facts, done.stderr


def compiler(folder, script):
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_compiler_that_fails_is_quoted(checkout, python, tmp_path):
    said = "x.cpp:3:1: error: no such thing as a concept"
    site = install(
        checkout, tmp_path / "site", CXX=compiler(tmp_path, f"echo '{said}' >&2; exit 1")
    )
    facts, _ = state(python, tmp_path, PYTHONPATH=site)
    assert not facts["available"]
    assert facts["reason"] == f"the C++ extension is not built (c++: {said}); {REBUILD}"


def test_a_compiler_that_is_not_there_is_named(checkout, python, tmp_path):
    site = install(checkout, tmp_path / "site", CXX="/nowhere/g++")
    facts, _ = state(python, tmp_path, PYTHONPATH=site)
    assert "g++ does not run (No such file or directory: /nowhere/g++)" in facts["reason"]
    assert facts["reason"].endswith(REBUILD)


def test_a_build_that_was_skipped_says_so(skipped, python, tmp_path):
    facts, said = state(python, tmp_path, PYTHONPATH=skipped)
    assert "not built (LORA_MOE_SKIP_EXT=1 was set)" in facts["reason"]
    assert "RuntimeWarning" not in said  # it was requested


def test_a_build_without_pybind11_says_so(checkout, python, tmp_path):
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "pybind11.py").write_text("raise ImportError('No module named pybind11')")
    site = install(checkout, tmp_path / "site", PYTHONPATH=hide)
    facts, _ = state(python, tmp_path, PYTHONPATH=site)
    assert "No module named pybind11" in facts["reason"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_one_instruction_set_that_fails_is_reported_while_another_runs(python, tmp_path):
    """The file of its older build does not get into the wheel."""
    checkout = copy_checkout(tmp_path / "checkout")
    isas = backend.cpu_isas()
    if len(isas) == 1:
        pytest.skip("a CPU with one instruction set")
    fails = f'case "$*" in *LORA_MOE_ISA={isas[0]}*) echo "error: too new" >&2; exit 1;; esac'
    cxx = compiler(tmp_path, f'{fails}\nexec g++ "$@"')
    command = [sys.executable, "setup.py", "build"]
    built = (
        checkout / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/lora_moe"
    )
    built.mkdir(parents=True)
    stale = built / f"_C_{isas[0]}{SUFFIX}"
    stale.touch()
    os.utime(stale, (0, 0))
    run(command, cwd=checkout, CXX=cxx, LORA_MOE_BUILD_ISA=f"{isas[0]},portable")
    assert not stale.exists()
    site = built.parent
    facts, _ = state(python, tmp_path, PYTHONPATH=site)
    assert facts["available"] and facts["isa"] == "portable"
    assert facts["reason"].startswith(f"_C_{isas[0]}") and "error: too new" in facts["reason"]


@pytest.fixture(scope="module")
def bare(checkout, tmp_path_factory):
    return install(checkout, tmp_path_factory.mktemp("bare") / "site", LORA_MOE_SKIP_EXT=1)


@pytest.fixture
def skipped(bare, tmp_path):
    return shutil.copytree(bare, tmp_path / "site")


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "file too short"), (b"no ELF" * 999, "invalid ELF header")]
)
def test_a_file_that_does_not_load(skipped, python, tmp_path, content, said):
    file = skipped / f"lora_moe/_C_portable{SUFFIX}"
    file.write_bytes(content)
    facts, warned = state(python, tmp_path, PYTHONPATH=skipped, LORA_MOE_ISA="portable")
    assert facts["reason"].startswith(f"{file.name} does not load with torch {torch.__version__}")
    assert said in facts["reason"] and facts["reason"].endswith(REBUILD)
    assert f"RuntimeWarning: lora_moe: {facts['reason']}" in warned


def test_a_file_for_another_python(skipped, python, tmp_path):
    (skipped / "lora_moe/_C_portable.cpython-399-x86_64-linux-gnu.so").touch()
    facts, warned = state(python, tmp_path, PYTHONPATH=skipped, LORA_MOE_ISA="portable")
    assert "_C_portable.cpython-399-x86_64-linux-gnu.so was built for another Python" in warned
    assert facts["reason"].endswith(REBUILD)


def test_sources_that_hide_the_installed_package(checkout, skipped, python, tmp_path):
    (skipped / f"lora_moe/_C_portable{SUFFIX}").touch()
    facts, warned = state(python, checkout, PYTHONPATH=skipped)
    assert facts["file"].startswith(str(checkout))
    assert facts["reason"] == (
        f"the sources in {checkout} shadow the installed package in {skipped}; leave that folder, or"
        f" run: pip install --no-build-isolation --no-deps -e {checkout}"
    )
    assert f"RuntimeWarning: lora_moe: {facts['reason']}" in warned


def test_an_editable_install_of_an_old_build_is_not_called_hidden(monkeypatch, tmp_path):
    """The folder is on sys.path twice, once through a link."""
    link = tmp_path / "link"
    link.symlink_to(missing_operators.HERE.parent)
    monkeypatch.setattr(sys, "path", [str(link)])
    assert missing_operators._hidden() is None


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_an_instruction_set_that_the_cpu_lacks_is_not_loaded(monkeypatch, isa):
    monkeypatch.setattr(torch.cpu, f"_is_{isa}_supported", lambda: False)
    monkeypatch.setenv("LORA_MOE_ISA", isa)
    with pytest.raises(backend.BackendUnavailable, match=f"LORA_MOE_ISA={isa}: this CPU"):
        backend._isas_to_try()


# --- variables and versions ----------------------------------------------------------------------


def test_empty_variables_count_as_unset(checkout, python, tmp_path):
    names = ("LORA_MOE_BACKEND", "LORA_MOE_ISA", "LORA_MOE_PLAN", "LORA_MOE_AUTOTUNE")
    code = "import lora_moe; print(lora_moe.backend_info()['requested'])"
    empty = dict.fromkeys((*names, "TRITON_INTERPRET"), "")
    assert run([python, "-c", code], cwd=checkout, **empty).stdout == "auto\n"
    names = re.findall(
        "LORA_MOE_\\w+|MAX_JOBS|TORCH_CUDA_ARCH_LIST|CXX\\w*|LDFLAGS|CUDA_HOME", NOTES
    )
    assert len(names) >= 8
    show = "import setup; print(len(setup.extensions()), setup.SKIP)"
    done = run([sys.executable, "-c", show, "--version"], cwd=checkout, **dict.fromkeys(names, ""))
    assert re.fullmatch("[1-9] None", done.stdout.splitlines()[-1])


NOTES = (ROOT / "setup.py").read_text().split('"""')[1]


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("LORA_MOE_BUILD_ISA", "avx3", "expected some of portable"),
        ("LORA_MOE_BUILD_ISA", "avx2,", "expected some of portable"),
        ("LORA_MOE_SKIP_EXT", "yes", "expected 0 or 1"),
        ("LORA_MOE_BUILD_CUDA", "on", "expected 0 or 1"),
        ("MAX_JOBS", "0", "expected a positive number"),
        ("MAX_JOBS", "many", "expected a positive number"),
    ],
)
def test_an_invalid_variable_is_refused(checkout, variable, value, expected):
    command = [sys.executable, "setup.py", "--version"]
    done = run(command, cwd=checkout, check=False, **{variable: value})
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"lora-moe: {variable}: {expected}") and line.endswith(repr(value))


def test_an_old_setuptools_says_what_to_type(checkout, tmp_path):
    """Python 3.11 installs 65.5 in each new environment; that version cannot read our pyproject.toml."""
    (tmp_path / "sitecustomize.py").write_text(
        "import setuptools\nsetuptools.__version__ = '65.5.0'\n"
    )
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    done = run(command, cwd=checkout, check=False, PYTHONPATH=tmp_path)
    assert done.returncode == 1
    wanted = 'expected setuptools 77 or newer, got 65.5.0; type: pip install "setuptools>=77"'
    assert wanted in done.stderr + done.stdout


def test_the_readme_installs_what_the_build_needs():
    """pip installs no build requirements with --no-build-isolation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (line,) = re.findall(
        r"^pip install .*--no-build-isolation.*$", (ROOT / "README.md").read_text(), re.M
    )
    needs = {re.split("[>=]", need)[0]: need for need in project["build-system"]["requires"]}
    assert f'"{needs["setuptools"]}"' in line and "pybind11" in line
    assert needs["setuptools"] in (ROOT / "setup.py").read_text()
