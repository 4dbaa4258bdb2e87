"""lora-moe bench: ours beside what a user could write in PyTorch, and beside what the machine can do."""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import report, suite
from benchmarks.shapes import SETS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="lora-moe bench", description=__doc__)
    parser.add_argument("--set", choices=SETS, default="claims", help="which shapes")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="shapes whose name has TEXT in it"
    )
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    parser.add_argument(
        "--pass", dest="passes", choices=suite.PASSES, nargs="+", default=suite.PASSES
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch's own choice by default")
    parser.add_argument("--repeats", type=int, metavar="N", default=7, help="interleaved turns")
    parser.add_argument(
        "--no-compile", action="store_true", help="eager peers only: much sooner done"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all samples, for compare")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    options = suite.Options(
        repeats=args.repeats,
        compiled=not (args.no_compile or args.quick),
        quick=args.quick,
        dtypes=tuple(DTYPES[name] for name in args.dtype),
        passes=tuple(args.passes),
    )
    shapes = [s for s in SETS["quick" if args.quick else args.set] if args.only in str(s)]
    result = suite.run(shapes, options, lambda text: print(text, file=sys.stderr))
    if args.json:
        args.json.write_text(json.dumps(result))
    text = report.markdown(result)
    if args.markdown:
        args.markdown.write_text(text)
    print(text)
    return 0
