"""Shared by the benchmarks of one layer: command line, turns, the check that outputs agree, the table."""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from benchmarks import machine, timing
from benchmarks.timing import duration
from examples.common import measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREE = {"fp32": 1e-5, "bf16": 3e-2}  # of the largest output
PLAIN = "no adapter"


class Call:
    """A contender's forward on `given`, and its forward plus backward; given[0] is x."""

    def __init__(self, forward, given, trained):
        self.forward, self.given = forward, given
        self.trained = [t for t in (*given, *trained) if t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        self.dy = torch.randn(given[0].shape, generator=generator).to(given[0])

    def step(self):
        for tensor in self.trained:
            tensor.grad = None
        self.forward(*self.given).backward(self.dy)
        if self.dy.is_cuda:
            torch.cuda.synchronize()


def main(args, contenders, around):
    """Times contenders(dtype), {name: Call}, for each dtype; `around` names the layer without an adapter."""
    if not args.fresh:
        machine.keep_memory()
    results = {}
    for dtype in args.dtype:
        calls = contenders(DTYPES[dtype])
        check(calls, AGREE[dtype])
        print(f"{dtype}: {args.repeats} turns of {', '.join(calls)}", file=sys.stderr, flush=True)
        steps = {name: call.step for name, call in calls.items()}
        results[dtype] = {
            "machine": machine.describe() if args.device == "cpu" else torch.cuda.get_device_name(),
            "tokens": args.tokens,
            "fresh": args.fresh,
            "seconds": timing.interleave(steps, args.repeats),
            "peak": {name: measure.peak_bytes(step) for name, step in steps.items()},
        }
        if args.json:
            args.json.write_text(json.dumps(results))
    text = "\n".join(markdown(dtype, result, around) for dtype, result in results.items())
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    return 0


def parse(argv, name, about, tokens):
    parser = argparse.ArgumentParser(
        prog=f"lora-moe bench {name}",
        description=about,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved turns")
    parser.add_argument(
        "--fresh", action="store_true", help="let glibc map new pages for large results"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser.parse_args(argv)


@torch.no_grad()
def check(calls, agree):
    """Raises unless the mixtures agree with each other and differ from the bare layer."""
    want = calls["ours"].forward(*calls["ours"].given).float()
    for name, call in calls.items():
        error = (call.forward(*call.given).float() - want).abs().max() / want.abs().max()
        if (error > agree) != (name == PLAIN):
            raise SystemExit(f"{name} differs from ours by {error:.3g}")


def markdown(dtype, result, around):
    seconds, peak = result["seconds"], result["peak"]
    lines = [
        f"{result['machine']}; {dtype}; {result['tokens']} tokens;"
        f" {'fresh results' if result['fresh'] else 'memory kept'}; medians of"
        f" {len(seconds['ours'])} interleaved turns, quartiles in brackets.",
        "",
        "| | forward + backward | / ours | peak of a call |",
        "|---|---:|---:|---:|",
    ]
    for name, samples in seconds.items():
        memory = "" if peak[name] is None else f"{peak[name] / 2**20:.0f} MiB"
        ratio = timing.ratio(samples[: len(seconds["ours"])], seconds["ours"])
        lines.append(f"| {name} | {duration(statistics.median(samples))} | {ratio} | {memory} |")
    plain = timing.ratio(seconds["ours"], seconds[PLAIN])
    return "\n".join([*lines, "", f"- ours: {plain} times the un-adapted {around}"]) + "\n"
