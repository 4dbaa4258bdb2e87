"""Prints the table; each package is compared in a separate process with its own search path."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from .measure import Found
from .packages import FOLDER, PACKAGES, Package

HEAD = (
    "ours", "theirs", "package", "dtype", "loss, ours", "loss, theirs", "loss apart", "dx apart",
    "gradients apart", "verdict",
)  # fmt: skip
TABLE = re.compile(r"^\| ours \|.*\n(?:\|.*\n)*", re.MULTILINE)
MARK = "found: "


def rows(package: Package) -> list[list[str]]:
    """The package's rows of the table, computed in another process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths(package))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __package__, "--one", package.name],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise RuntimeError(f"{package.name}: {done.stderr.strip()[-2000:]}")
    return shown(package, json.loads(lines[0].removeprefix(MARK)))


def shown(package: Package, found: dict) -> list[list[str]]:
    whose = f"({package.by}, {package.license})"
    if found["missing"]:
        empty, told = ["-"] * 6, f"not installed: `{package.command}`"
        return [
            [*names, f"{package.name} {whose}", *empty, told] for names in package.pairs.values()
        ]
    return [
        [*package.pairs[pair], f"{found['version']} {whose}", *cells(Found(**values))]
        for pair, values in found["pairs"].items()
    ]


def paths(package: Package) -> list[str]:
    """Search path of the package's process: its own folder first, if it exists."""
    folder = Path(FOLDER, package.module)
    return [*([str(folder)] if folder.is_dir() else []), ".", os.environ.get("PYTHONPATH", "")]


def cells(found: Found) -> list[str]:
    apart = [f"{value:.1e}" for value in (found.loss, found.dx, found.gradients)]
    apart[2] += f" of {found.tensors}"
    verdict = "agree" if found.agrees else "**differ**"
    if found.why:
        verdict += f" to {found.bound:.0e}: {found.why}"
    return [found.dtype, *(f"{loss:.9g}" for loss in found.losses), *apart, verdict]


def one(package: Package) -> None:
    """Runs the package's comparisons in this process and prints the results."""
    logging.disable(logging.WARNING)
    found = {"missing": package.missing(), "pairs": {}}
    if not found["missing"]:
        found["version"] = package.version
        found["pairs"] = {pair: dataclasses.asdict(package.compare(pair)) for pair in package.pairs}
    print(MARK + json.dumps(found))


def table(packages: Iterable[Package]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *(row for package in packages for row in rows(package))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def put_into(page: Path, text: str) -> None:
    whole, count = TABLE.subn(lambda _: text, page.read_text())
    if count != 1:
        raise SystemExit(f"{page}: expected one table that starts with | ours |, got {count}")
    page.write_text(whole)


def main() -> None:
    known = {package.name: package for package in PACKAGES}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=", ".join(known))
    parser.add_argument("--into", type=Path, help="a Markdown file whose table is replaced")
    parser.add_argument("--one", choices=known, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.packages) - known.keys():
        parser.error(f"expected packages among {', '.join(known)}, got {', '.join(unknown)}")
    if args.one:
        one(known[args.one])
        return
    found = table(known[name] for name in args.packages or known)
    print(found, end="")
    if args.into:
        put_into(args.into, found)


if __name__ == "__main__":
    main()
