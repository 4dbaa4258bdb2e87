"""The package as installed: wheel, editable install, checkout; without Triton, without a compiler."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from ..support.packages import (
    FIRST_STEPS,
    NO_TRITON,
    PIP,
    ROOT,
    build_wheel,
    copy_checkout,
    make_venv,
    run,
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    interpreter = make_venv(tmp_path_factory.mktemp("venv"))
    return lambda code, **rest: run([interpreter, "-c", code], **rest)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"), LORA_MOE_SKIP_EXT=1)[0]


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder for PYTHONPATH with the wheel and an unrelated package named triton_kernels."""
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
    modules.add("lora_moe/py.typed")
    assert modules <= set(names)
    rest = set(names) - modules - {"lora_moe/_not_built.json"}
    assert all(".dist-info/" in name for name in rest), rest
    assert any(name.endswith("licenses/LICENSE") for name in rest)


def test_wheel_states_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    text = {Path(n).name: archive.read(n).decode() for n in archive.namelist() if "dist-info" in n}
    needs = [line for line in text["METADATA"].splitlines() if line.startswith("Requires-Dist")]
    always = {line.split()[1] for line in needs if "extra ==" not in line}
    assert always == {"torch>=2.10", "numpy"}
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
        ("cuda", "the CUDA extension is not built"),
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


def test_import_loads_no_heavy_package(python, site, tmp_path):
    code = (
        "import sys, torch, lora_moe\n"
        "heavy = {'transformers', 'peft', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()"
    )
    python(code, cwd=tmp_path, PYTHONPATH=site)


def test_optional_packages_are_imported_on_first_use(python, site, tmp_path):
    code = (
        "import sys, lora_moe\n"
        "assert 'hf' in dir(lora_moe) and 'lora_moe.hf' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "try: lora_moe.hf\n"
        "except ImportError as error: assert 'transformers' in str(error), error\n"
        "try: lora_moe.no_such_thing\n"
        "except AttributeError as error: assert 'no_such_thing' in str(error)\n"
        "else: raise AssertionError\n"
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


# --- the sdist -----------------------------------------------------------------------------------

TREE = (
    "csrc",
    "tests",
    "benchmarks",
    "docs",
    "examples",
    "requirements",
    "lora_moe",
    "triton_kernels",
)
MADE = {"__pycache__", ".so", ".pyc", "_not_built.json"}


def make_sdist(folder, **environment):
    """An sdist of the whole checkout, unpacked in another folder."""
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(".*", "build", *MADE))
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder]
    run(command, cwd=folder / "copy", **environment)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return make_sdist(tmp_path_factory.mktemp("sources"), LORA_MOE_SKIP_EXT=1)


def files(root):
    found = [path.relative_to(root) for name in TREE for path in (root / name).rglob("*")]
    return {str(p) for p in found if (root / p).is_file() and not MADE & {*p.parts, p.suffix}}


def test_sdist_is_the_checkout(sdist):
    wanted = files(ROOT) | {"Makefile", "SECURITY.md", "CHANGELOG.md", "LICENSE", "README.md"}
    assert not {name for name in wanted if not (sdist / name).is_file()}
    assert not list(sdist.rglob("*.so")) and not (sdist / "build").exists()


def test_sdist_is_the_same_where_operators_would_be_built(sdist, tmp_path):
    assert files(make_sdist(tmp_path, LORA_MOE_SKIP_EXT="")) == files(sdist)


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    again, _ = build_wheel(sdist, tmp_path, LORA_MOE_SKIP_EXT=1)
    names = [sorted(zipfile.ZipFile(w).namelist()) for w in (again, wheel)]
    assert names[0] == names[1]


def test_sdist_runs_its_own_tests(sdist):
    """With the sdist's sources only; the comparison of files above covers the tests' helpers."""
    code = "import lora_moe, pytest; print(lora_moe.__file__); raise SystemExit(pytest.main())"
    options = "-q -p no:cacheprovider tests/public/test_safefile.py"
    done = run([sys.executable, "-c", code], cwd=sdist, PYTHONPATH=sdist, PYTEST_ADDOPTS=options)
    assert str(sdist) in done.stdout and " passed" in done.stdout
