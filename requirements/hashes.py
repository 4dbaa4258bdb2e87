"""Writes hashes.txt: the SHA-256 of the wheels of every pinned package (make hashes).

pip itself resolves each pin for several Pythons and machines, without installing anything, and reports what
it would take.  A pin whose hash is there already is not asked for again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

FOLDER = Path(__file__).parent
TARGET = FOLDER / "hashes.txt"
LEFT_OUT = {
    "torch",
    "deepspeed",
}  # the user chooses its build; has sources only, for optional tests
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")
GLIBC = (
    *(f"manylinux_2_{n}" for n in range(39, 4, -1)),
    *("manylinux2014", "manylinux2010", "manylinux1", "linux"),
)
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s\\;]+)", re.M)
HEADER = """\
# SHA-256 of the wheels of every pinned package, for Linux on x86-64 and aarch64; torch is left out, whose
# build the user chooses.  Written by `make hashes`, compared with the registry by `make check-hashes`.
"""


def canonical(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def pins() -> set[tuple[str, str]]:
    texts = [path.read_text() for path in FOLDER.glob("*.txt") if path != TARGET]
    found = {(canonical(name), version) for text in texts for name, version in PIN.findall(text)}
    return {pin for pin in found if pin[0] not in LEFT_OUT}


def known() -> dict[tuple[str, str], set[str]]:
    hashes = defaultdict(set)
    for block in re.split(r"\n(?=\S)", TARGET.read_text() if TARGET.exists() else ""):
        if pin := PIN.match(block):
            hashes[canonical(pin[1]), pin[2]] |= set(re.findall(r"sha256:([0-9a-f]{64})", block))
    return hashes


def asked(wanted, python: str, machine: str) -> dict[tuple[str, str], set[str]]:
    """What pip would install of these there."""
    with tempfile.TemporaryDirectory() as folder:
        listed, report = Path(folder, "pins.txt"), Path(folder, "report.json")
        listed.write_text("".join(f"{name}=={version}\n" for name, version in sorted(wanted)))
        platforms = [f"--platform={glibc}_{machine}" for glibc in GLIBC]
        command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        command += ["--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:"]
        command += ["--ignore-requires-python", f"--python-version={python}", *platforms]
        command += [f"--target={folder}/none", f"--report={report}", f"--requirement={listed}"]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    hashes = {}
    for item in found:
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        hashes[canonical(item["metadata"]["name"]), item["metadata"]["version"]] = {digest}
    return hashes


def main() -> None:
    wanted, hashes = pins(), known()
    new = {pin for pin in wanted if pin not in hashes}
    for python in PYTHONS if new else ():
        for machine in MACHINES:
            for pin, digests in asked(new, python, machine).items():
                hashes[pin] |= digests
    lines = [HEADER]
    for pin in sorted(wanted):
        digests = " \\\n".join(f"    --hash=sha256:{digest}" for digest in sorted(hashes[pin]))
        lines.append(f"{pin[0]}=={pin[1]} \\\n{digests}\n")
    TARGET.write_text("".join(lines))
    print(f"{TARGET.name}: {len(wanted)} packages, {len(new)} of them new")


if __name__ == "__main__":
    main()
