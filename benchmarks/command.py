"""lora-moe bench: the layers against what a user could write in PyTorch, and against the machine's limits.

    lora-moe bench [--set claims|layers|scaling|all] [--dtype fp32 bf16] [--json FILE] ...
    lora-moe bench compare OLD.json NEW.json
    lora-moe bench end-to-end [...]
    lora-moe bench ffn [...]
    lora-moe bench experts [...]

Rows are printed as they are measured, with the remaining time; Ctrl-C ends the run and reports them.
On a GPU, all plans are timed with CUDA events and in CUDA graphs.  Without a GPU, the CPU is timed, and
--set all also reports registers, spills and occupancy of the compiled GPU kernels.
"""

import argparse
import json
import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import compare, gpu, report, scaling, suite
from benchmarks.shapes import QUICK, SETS

ROOT = Path(__file__).parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare_files(argv[1:])
    if argv[:1] == ["end-to-end"]:
        from benchmarks import end_to_end

        return end_to_end.main(argv[1:])
    if argv[:1] == ["ffn"]:
        from benchmarks import ffn

        return ffn.main(argv[1:])
    if argv[:1] == ["experts"]:
        from benchmarks import native_experts

        return native_experts.main(argv[1:])
    args = parse(argv)
    for name in (
        "_subclasses.fake_tensor",
        "_dynamo",
    ):  # the report lists failures, one per line
        logging.getLogger(f"torch.{name}").setLevel(logging.CRITICAL)
    if args.threads:
        torch.set_num_threads(args.threads)
    options = options_of(args)
    if options.device == "cpu":
        print("No usable GPU found: only the CPU is timed.", file=sys.stderr)
    result = measure(args, options)
    if args.json:
        args.json.write_text(json.dumps(result))
    text = report.markdown(result)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    if args.png:
        draw(args.png, result)
    if options.device == "cpu" and args.set == "all" and find_spec("benchmarks.gpu_static"):
        return subprocess.run([sys.executable, "-m", "benchmarks.gpu_static"], cwd=ROOT).returncode
    return 0


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="lora-moe bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--set", choices=[*SETS, "scaling"], default="claims", help="which shapes")
    add("--quick", action="store_true", help="a smoke test: tiny shapes, eager peers")
    add("--only", metavar="TEXT", default="", help="only shapes with TEXT in their name")
    add("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    add("--pass", dest="passes", choices=suite.PASSES, nargs="+", default=suite.PASSES)
    add("--device", choices=["cpu", "cuda"], help="default: cuda if available")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add("--repeats", type=int, metavar="N", default=7, help="interleaved turns")
    add("--no-compile", action="store_true", help="only eager peers; much faster")
    add("--json", type=Path, metavar="FILE", help="write all samples, for compare")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    add("--png", type=Path, metavar="FOLDER", help="write the plots; needs matplotlib")
    return parser.parse_args(argv)


def options_of(args):
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return suite.Options(
        device=device,
        repeats=args.repeats,
        compiled=not (args.no_compile or args.quick),
        quick=args.quick,
        dtypes=tuple(DTYPES[name] for name in args.dtype),
        passes=tuple(args.passes),
        clocks=suite.CPU_CLOCKS if device == "cpu" else gpu.CLOCKS,
    )


def measure(args, options):
    def progress(text):
        print(text, file=sys.stderr, flush=True)

    def keep(result):  # a killed run keeps its results so far
        if args.json:
            args.json.write_text(json.dumps(result))

    shapes = QUICK if args.quick else SETS.get(args.set, [])
    shapes = [s for s in shapes if args.only in str(s)]
    result = suite.run(shapes, options, progress, keep)
    if (args.quick or args.set in ("scaling", "all")) and "stopped" not in result:
        scaling.run(options, result, progress, keep)
    return result


def draw(folder, result):
    from benchmarks import plots

    folder.mkdir(parents=True, exist_ok=True)
    if result["rows"]:
        plots.draw_gains(folder / "gains.png", result)
    if result.get("scaling"):
        plots.draw_scaling(folder / "scaling.png", result["scaling"])


def compare_files(argv):
    parser = argparse.ArgumentParser(prog="lora-moe bench compare", description=compare.__doc__)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    args = parser.parse_args(argv)
    old, new = (json.loads(path.read_text()) for path in (args.old, args.new))
    text, regressed = compare.markdown(old, new)
    print(text)
    return int(regressed)
