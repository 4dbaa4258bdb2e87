"""The package as users get it: wheel, editable install, checkout; without Triton, without a compiler."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
SHIPPED = ("setup.py", "pyproject.toml", "LICENSE", "README.md", "lora_moe", "triton_kernels")

# what a user's first lines do; it passes whichever backend serves
FIRST_STEPS = """
import torch, lora_moe
y, routing = lora_moe.functional.routed_lora(
    torch.ones(3, 8), torch.eye(4, 8), torch.ones(8, 8), torch.ones(8, 5), 2, rank_offsets=2
)
assert torch.allclose(y, torch.full((3, 5), 16.0)), y
print(lora_moe.__file__)
"""
NO_TRITON = "import sys; sys.modules['triton'] = None\n"


def run(command, *, cwd, check=True, **environment):
    """A command in an environment without our own variables, so that only what is given counts."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LORA_MOE_", "TRITON_"))}
    kept.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {k: str(v) for k, v in environment.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def make_venv(folder) -> Path:
    """Its python sees our packages, but no .pth file beside them: no editable install of ourselves."""
    venv.create(folder)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    (packages / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    return folder / "bin/python"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    interpreter = make_venv(tmp_path_factory.mktemp("venv"))
    return lambda code, **rest: run([interpreter, "-c", code], **rest)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The sources alone: no build folder, no compiled extension, no kernels that are slow to compile."""
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder)
    (folder / "csrc").mkdir()
    shutil.copy(ROOT / "csrc/module.cpp", folder / "csrc")
    return folder


def build_wheel(checkout, out, **environment):
    shutil.rmtree(checkout / "build", ignore_errors=True)  # setuptools packs what it finds there
    command = [*PIP, "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", out, "."]
    done = run(command, cwd=checkout, **environment)
    (wheel,) = out.glob("*.whl")
    return wheel, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"), LORA_MOE_SKIP_EXT=1)[0]


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder for PYTHONPATH with the wheel in it, beside a stranger named triton_kernels."""
    folder = tmp_path_factory.mktemp("site")
    run([*PIP, "install", "--no-deps", "--target", folder, wheel], cwd=folder)
    (folder / "triton_kernels").mkdir()
    (folder / "triton_kernels/__init__.py").write_text("stranger = True\n")
    return folder


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {
        f"{prefix}{path.relative_to(ROOT / source)}"
        for source, prefix in (
            ("lora_moe", "lora_moe/"),
            ("triton_kernels", "lora_moe/triton_kernels/"),
        )
        for path in (ROOT / source).rglob("*.py")
    }
    assert modules <= set(names)
    rest = set(names) - modules
    assert all(".dist-info/" in name for name in rest), rest
    assert any(name.endswith("licenses/LICENSE") for name in rest)


def test_wheel_states_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    text = {Path(n).name: archive.read(n).decode() for n in archive.namelist() if "dist-info" in n}
    needs = [line for line in text["METADATA"].splitlines() if line.startswith("Requires-Dist")]
    always = {line.split()[1] for line in needs if "extra ==" not in line}
    assert always == {"torch>=2.10", "numpy", "safetensors", "tqdm"}
    assert "lora-moe = lora_moe.cli:main" in text["entry_points.txt"]


def test_installed_wheel_works_beside_the_other_triton_kernels(python, site, tmp_path):
    code = FIRST_STEPS + "import triton_kernels; assert triton_kernels.stranger"
    assert str(site) in python(code, cwd=tmp_path, PYTHONPATH=site).stdout
    pytest.importorskip("triton")
    code = "import lora_moe.triton_kernels as ours; print(ours.__file__)"
    assert str(site / "lora_moe") in python(code, cwd=tmp_path, PYTHONPATH=site).stdout


def test_installed_wheel_says_where_the_benchmarks_are(python, site, tmp_path):
    code = "from lora_moe.cli import main; raise SystemExit(main(['bench']))"
    done = python(code, cwd=tmp_path, check=False, PYTHONPATH=site)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("run it in a checkout of the sources")


def test_checkout_works_without_installing(python, checkout):
    assert str(checkout) in python(FIRST_STEPS, cwd=checkout).stdout
    bare = python("import triton_kernels", cwd=checkout, check=False)
    assert bare.returncode == 1
    assert "ImportError" in bare.stderr
    assert "lora_moe.triton_kernels" in bare.stderr


def test_editable_install(checkout, tmp_path):
    inner = make_venv(tmp_path / "venv")
    install = [*PIP, "--python", inner, "install", "--no-deps", "--no-build-isolation", "-e", "."]
    run(install, cwd=checkout, LORA_MOE_SKIP_EXT=1)
    code = FIRST_STEPS + "import importlib.util as u; assert u.find_spec('triton_kernels') is None"
    assert str(checkout) in run([inner, "-c", code], cwd=tmp_path).stdout
    info = run([tmp_path / "venv/bin/lora-moe", "info"], cwd=tmp_path).stdout
    assert "the C++ extension is not built" in info


def test_works_without_triton(python, site, tmp_path):
    code = NO_TRITON + FIRST_STEPS + "from lora_moe.cli import main; main(['info'])"
    assert "triton is not installed" in python(code, cwd=tmp_path, PYTHONPATH=site).stdout


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        ("cpp", "the C++ extension is not built"),
        ("triton", "triton is not installed"),
        ("cuda", "not part of this build"),
    ],
)
def test_backend_that_is_forced_and_missing_raises(python, site, tmp_path, backend, why):
    done = python(
        NO_TRITON + "import lora_moe",
        cwd=tmp_path,
        check=False,
        PYTHONPATH=site,
        LORA_MOE_BACKEND=backend,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "BackendUnavailable" in last
    assert f"LORA_MOE_BACKEND={backend}" in last
    assert why in last


def test_importing_is_light(python, site, tmp_path):
    code = (
        "import sys, torch, lora_moe\n"
        "heavy = {'transformers', 'peft', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()"
    )
    python(code, cwd=tmp_path, PYTHONPATH=site)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_extension_says_how_it_was_built(python, checkout, tmp_path):
    wheel, _ = build_wheel(checkout, tmp_path, LORA_MOE_BUILD_ISA="portable", LORA_MOE_SKIP_EXT=0)
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import json, lora_moe; print(json.dumps(lora_moe.backend_info()['backends']['cpp']))"
    built = json.loads(python(code, cwd=tmp_path, LORA_MOE_ISA="portable").stdout)
    assert built["available"], built["reason"]
    assert built["isa"] == "portable"
    assert built["build_type"] == "release"
    assert int(built["torch_target_version"], 16) >> 48 == 0x020A
    assert built["pybind11_version"] == importlib.metadata.version("pybind11")  # not torch's copy


def test_failing_compiler_leaves_a_package_that_works(checkout, tmp_path):
    wheel, log = build_wheel(checkout, tmp_path, CXX="/bin/false")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    assert "C++ operators not built" in log
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    failed = run(build, cwd=checkout, check=False, CXX="/bin/false", LORA_MOE_SKIP_EXT=0)
    assert failed.returncode != 0
