"""The command line: lora-moe info | inspect DIR | convert SOURCE DIR | doctor | bench."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

from . import __version__
from .backend import BACKENDS, backend_info

TIMEOUT_S = 300  # for the checks of one backend
_DOCTOR_ROW = "{:<10} {:<15} {:<9} {:>10} {:>10} {:>9}  {}"


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit status: 0 on success, 1 on failure, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="lora-moe",
        description="Fast mixtures of LoRA experts for PyTorch.",
        epilog="`lora-moe COMMAND --help` shows the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"lora-moe {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    about = "show which backend serves each device, and why the others do not"
    command = commands.add_parser("info", help=about, description=about)
    command.set_defaults(run=lambda _: info())

    about = "show the configuration and tensors of a saved adapter without reading the weights"
    command = commands.add_parser("inspect", help=about, description=about)
    command.add_argument("directory", metavar="DIR", help="folder written by save_adapter")
    about = "plot expert load over training from DIR/router_history.json (needs matplotlib)"
    command.add_argument("--png", metavar="FILE", help=about)
    command.set_defaults(run=lambda args: inspect(args.directory, args.png))

    about = "convert another package's checkpoint to an adapter, or an adapter to PEFT folders"
    command = commands.add_parser("convert", help=about, description=about)
    command.add_argument("source", metavar="SOURCE", help="folder or tensor file")
    command.add_argument("directory", metavar="DIR", help="output folder, created if missing")
    formats = "mixlora, loramoe, mola, hydralora, meteora, coin, poly, peft or lora_moe"
    command.add_argument("--format", help=f"format of SOURCE: {formats} (default: detected)")
    about = "for meteora: the folders of its LoRAs, in loading order"
    command.add_argument("--adapters", metavar="DIR", nargs="+", default=(), help=about)
    about = "experts per token, for meteora (default: 2) and peft"
    command.add_argument("--top-k", metavar="K", type=int, help=about)
    command.set_defaults(run=convert)

    about = "compare forward and gradients of every backend on this machine with fp64"
    command = commands.add_parser("doctor", help=about, description=about)
    command.add_argument(
        "backends",
        metavar="BACKEND",
        nargs="*",
        help=f"backends to check: {', '.join(BACKENDS)} (default: all)",
    )
    command.set_defaults(run=lambda args: doctor(args.backends))

    about = "time the layers against plain PyTorch and the machine's limits (needs a checkout)"
    command = commands.add_parser("bench", help=about, add_help=False)  # parses its own options
    command.set_defaults(run=None)

    args, rest = parser.parse_known_args(argv)
    if args.run is None:
        return bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args.run(args)


def info() -> int:
    facts = backend_info()
    requested, serving, backends = (facts.pop(k) for k in ("requested", "serving", "backends"))
    versions = {"lora-moe": __version__, "triton": _version("triton"), **facts}
    for name, value in versions.items():
        print(f"{name.replace('_', ' '):<15} {value}")
    for device, name in serving.items():
        print(f"{device + ' tensors':<15} {name}")
    print(f"\nbackends (LORA_MOE_BACKEND={requested})")
    for name, state in backends.items():
        available, reason = state.pop("available"), state.pop("reason")
        about = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in state.items())
        why = "; ".join(filter(None, (reason, about)))
        print(f"  {name:<10} {'yes' if available else 'no':<4} {why}".rstrip())
    return 0


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def inspect(directory: str, png: str | None = None) -> int:
    from .io import adapter_info

    try:
        adapter = adapter_info(directory)
    except (OSError, ValueError) as error:
        print(f"lora-moe inspect: {error}", file=sys.stderr)
        return 1
    print(f"saved by lora-moe {adapter['library']!a}, format {adapter['version']!a}")
    for part in adapter["adapters"]:
        print()
        for name in (field.name for field in dataclasses.fields(part["config"])):
            value = getattr(part["config"], name)
            print(f"{name:<20} {value!r}")
        print(f"{'modules':<20} {', '.join(map(_plain, part['modules']))}")
    _print_tensors(adapter["tensors"])
    return 0 if png is None else _draw(directory, png)


def convert(args) -> int:
    from .convert import convert

    options = {"format": args.format, "adapters": args.adapters, "top_k": args.top_k}
    try:
        converted = convert(args.source, args.directory, **options)
    except (OSError, ValueError) as error:
        print(f"lora-moe convert: {error}", file=sys.stderr)
        return 1
    for path in converted.paths:
        print(f"{converted.format}: wrote {path}")
    for note in converted.notes:
        print(f"note: {note}")
    return 0


def _draw(directory, png):
    from .heatmap import draw
    from .history import History

    try:
        draw(History.load(directory), png)
    except (ImportError, OSError, ValueError) as error:
        print(f"lora-moe inspect: {error}", file=sys.stderr)
        return 1
    print(f"\nexpert load over training: {png}")
    return 0


def _plain(text):
    """Text from an untrusted file, with the control characters escaped."""
    return ascii(text)[1:-1]


def _print_tensors(tensors):
    print(f"\n{'tensor':<60} {'dtype':<5} {'shape':<16} {'values':>12}")
    for name, tensor in tensors.items():
        row = f"{_plain(name):<60} {_plain(tensor.dtype):<5} {tensor.shape!s:<16}"
        print(f"{row} {math.prod(tensor.shape):>12,}")
    print(f"{'all':<83} {sum(math.prod(t.shape) for t in tensors.values()):>12,}")


def doctor(backends) -> int:
    """Check each backend in a separate process, since it is chosen at import and may crash."""
    print(_DOCTOR_ROW.format("backend", "check", "dtype", "output", "gradients", "limit", ""))
    results = [_examine(name) for name in backends or BACKENDS]
    print("errors against fp64, in units of each dtype's rounding error u")
    # None: unavailable on this machine, which is an error only if it was requested by name
    return 0 if all(passed or (passed is None and not backends) for passed in results) else 1


def _examine(name):
    """Print a backend's rows; return whether it passed, or None if it is unavailable."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = {**os.environ, "LORA_MOE_BACKEND": name, "PYTHONPATH": path}
    if name == "triton" and not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-P", "-W", "ignore", "-m", "lora_moe.doctor"]
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        print(f"{name:<10} FAIL: timed out after {TIMEOUT_S} s")
        return False
    passed = [_print_check(name, *json.loads(line)) for line in run.stdout.splitlines()]
    if run.returncode == 0:
        return bool(passed) and all(passed)
    reason = (run.stderr.splitlines() or [f"ended with status {run.returncode}"])[-1]
    _, _, why = reason.partition("BackendUnavailable: ")
    print(f"{name:<10} {'unavailable: ' + why if why else 'FAIL: ' + reason}")
    return None if why else False


def _print_check(name, check, dtype, output, gradients, limit):
    passed = max(output, gradients) <= limit
    numbers = [f"{value:.2f} u" for value in (output, gradients, limit)]
    print(_DOCTOR_ROW.format(name, check, dtype, *numbers, "ok" if passed else "FAIL"))
    return passed


def bench(argv) -> int:
    """Run the benchmark suite, which is in a checkout but not in the wheel."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "benchmarks/command.py").exists():
        print(
            "lora-moe bench: the benchmarks are not in the wheel; run it in a checkout of the sources",
            file=sys.stderr,
        )
        return 1
    sys.path.insert(0, str(checkout))
    from benchmarks import command

    return command.main(argv)


if __name__ == "__main__":
    raise SystemExit(main())
