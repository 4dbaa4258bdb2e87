"""Would the tests detect a missing bounds mask or barrier?  Each is removed, and some output must change.

    LD_PRELOAD=libasan.so python -m tests.support.cuda_shim.planted_bugs [PATTERN] [--step N]

Both are found in the sources.  A mask is any comparison that is evaluated at run time: without it, the
guarded code always runs, or a loop runs one step longer.  One build with sanitizers contains all bugs, each
with a number that is selected at run time; a barrier is removed by its line.  Every experiment runs in a
fork: an abort counts as detected.  Prints one line per bug with its name and whether it was detected.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .. import slots
from ..cases import Case, sample
from .build import FOLDER, ROOT, Kernels, build

# Bugs that no output shows here, and why.  Blocks and warps run one after another, without races.
UNSEEN = {
    "expand.cu: p.R2 > 0": "sums of no second pair are zero",
    "gating.h: t < (group + 1) * kGroup": "backward, a warp does its neighbor's token again",
    "product.h: pack < kPacks": "loads what no thread stores",
    "product.h: n < N": "multiplies zeros",
    "product.h: k + BK < end": "loads zeros",
    "router.cu: i > 0": "every thread writes the same",
    "router.cu: i < n": "the host launches for nothing",
    "routing.h: barrier: other lanes read them": "lanes meet in shuffles before one reads another's",
    "routing.h: lane == 0": "every lane writes the same",
    "segmented.cu: tile.count <= 0": "a tile without tokens loads and stores nothing",
    "segmented.cu: rank >= ranks": "nor does one without ranks",
    "shrink.h: column < p.R": "stores no column past R",
    "shrink.h: across == 1": "every block does the middle, the last one right",
    "shrink.h: p.splits() == 1": "no caller asks for a middle then",
    "shrink.h: p.R <= 64": "other tiles, the same sums",
    "shrink.h: p.R <= 128": "other tiles, the same sums",
    "shrink.h: p.R > 256": "other tiles, the same sums",
    "sort_slots.cu: threadIdx.x % 32 == 0": "every lane writes the same",
    "sort_slots.cu: threadIdx.x == 0": "every thread writes the same",
    "sort_slots.cu: e == E": "every block writes the same",
    "sort_slots.cu: first < p.tokens": "no token is past the last",
    "sort_slots.cu: lane == 0": "every lane writes the same",
}

PART = r"(?:[\w.]+(?:<\w+>)?(?:\([^()]*\))?(?:\[[^\]]*\])?|\([^()]*\))"
SIDE = rf"{PART}(?:\s[-+*/%]\s{PART})*"
COMPARISON = re.compile(rf"(?<![\w.\])>]){SIDE}\s(?:[<>]=?|[=!]=)\s(?P<limit>{SIDE})")
CLIPPED = re.compile(rf"\bmin\({SIDE}, (?P<limit>[\w.]+)\)")
VALID = re.compile(r"(?<!bool )\bis_expert\([^()]*\)")
FOR = re.compile(r"\bfor \([^;]*;([^;]*);")
LEAVE = re.compile(r"\bif \(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)\s+(?:return;|continue|break)")
COMPILE_TIME = re.compile(r".*\b(?:constexpr|static_assert|while|template)\b|\s*#")
CONSTANT = re.compile(r"\d+|(?:\w+::)?k[A-Z]\w*|[A-Z]{2}|N|MI \* NI|kRows \* kExperts")


class Mask(NamedTuple):
    file: str
    line: int
    span: tuple[int, int]
    text: str
    wrong: str  # BUG is true where it is switched on

    def __str__(self):
        return f"{self.file}:{self.line}: {self.text}"


def masks(csrc: Path) -> list[Mask]:
    """All masks of the kernels and their launchers, in order."""
    return [
        mask
        for path in sorted((csrc / "cuda").iterdir())
        if path.suffix in (".h", ".cu") and not re.search(r"\bTensor\b", path.read_text())
        for mask in sorted(_masks(path.name, path.read_text()), key=lambda mask: mask.span)
    ]


def _masks(file, text):
    text = re.sub("//.*", lambda comment: " " * len(comment[0]), text)
    in_for = [m.span(1) for m in FOR.finditer(text)]
    leaving = [m.span(1) for m in LEAVE.finditer(text)]

    def mask(match, wrong):
        return Mask(file, text.count("\n", 0, match.start()) + 1, match.span(), match[0], wrong)

    for match in CLIPPED.finditer(text):
        yield mask(match, f"{match[0][:-1]} + (BUG ? 32 : 0))")
    for match in VALID.finditer(text):
        yield mask(match, f"(BUG || {match[0]})")
    for match in COMPARISON.finditer(text):
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.end()]
        if COMPILE_TIME.match(line):
            continue
        if not _inside(match, in_for):
            keeps = "!BUG &&" if _inside(match, leaving) else "BUG ||"
            yield mask(match, f"({keeps} {match[0]})")
        elif not CONSTANT.fullmatch(match["limit"]):
            yield mask(match, f"{match[0]} + (BUG ? 1 : 0)")


def _inside(match, spans):
    return any(first <= match.start() and match.end() <= last for first, last in spans)


def plant(csrc: Path, target: Path) -> list[Mask]:
    """Writes a copy of the sources with all bugs, switched off; returns the masks."""
    shutil.copytree(csrc, target, dirs_exist_ok=True)
    found = masks(csrc)
    for number, mask in reversed(list(enumerate(found, 1))):
        path = target / "cuda" / mask.file
        text, (first, last) = path.read_text(), mask.span
        wrong = mask.wrong.replace("BUG", f"(cuda_shim::planted == {number})")
        path.write_text(text[:first] + wrong + text[last:])
    return found


def barriers(csrc: Path) -> list[tuple[str, int]]:
    """[(file, line)] of every __syncthreads and __syncwarp."""
    return [
        (path.name, number)
        for path in sorted((csrc / "cuda").iterdir())
        if path.suffix in (".h", ".cu")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"__sync(threads|warp)\(\);", line)
    ]


SEED = torch.Generator().manual_seed
ORDERS = "forward", "reverse"
CASES = [  # each way through the kernels, none of whose tiles fit; what takes long comes last
    (Case("no rows", 0, 4, 2, 8, 300, 280), torch.float32),
    (Case("several splits", 5, 3, 2, 8, 300, 280), torch.float16),
    (Case("middle alone", 13, 40, 2, 7, 24, 24, with_router_bias=True), torch.bfloat16),
    (Case("64 columns, aligned", 70, 5, 2, 8, 40, 72, shared_a=True), torch.float16),
    (Case("256 columns", 37, 3, 2, (70, 60, 50), 40, 72, with_bias=True), torch.float32),
    (Case("128 columns, scalar loads", 65, 7, 3, 17, 129, 65), torch.bfloat16),
]
MANY = Case("two launches for the table of ranks", 1, 520, 2, (2, *[1] * 519), 8, 8)


def outputs(kernels) -> Iterator[list[torch.Tensor]]:
    """Yields the outputs of all operators for every case and plan."""
    for case, dtype in CASES:
        yield from outputs_of(kernels, case, dtype)
    case, ids = MANY, torch.tensor([[0, 519]], dtype=torch.int32)
    v = sample(case)
    experts = v["scaling"], case.offsets, case.shared_a, "none", "decode"
    yield kernels.grouped_lora(v["x"], v["lora_A"], v["lora_B"], None, ids, ids.cos(), *experts)


def outputs_of(kernels, case, dtype):
    v = sample(case, dtype)
    x, w, a, b, base = (v[k] for k in ("x", "router_weight", "lora_A", "lora_B", "base"))
    experts = v["scaling"], case.offsets, case.shared_a
    options = case.gate, case.renormalize
    needs = [0], True, True, True, True
    router = case.K, *options, 0.6, 0.2  # both drop some
    given = torch.randint(-1, case.E + 1, (case.T, case.K), dtype=torch.int32, generator=SEED(0))
    given[::3, 1] = given[::3, 0]  # twice
    ones, b_nan = torch.ones_like(given), b.clone()
    b_nan[: case.offsets[1]] = torch.nan  # of an expert that is not in ones
    for plan in ("rank_dense", "segmented", "decode"):
        out = kernels.routed_lora(
            x, w, a, b, base, v["bias"], v["router_bias"], *experts, *router, plan
        )
        _, ids, weights, logits, mean_prob, lse, _, s = out
        aux = [t.cos() for t in (weights, logits, mean_prob, lse)]
        saved = x, w, a, b, s, ids, weights, logits
        dy = base.cos()
        grads = kernels.routed_lora_backward(
            dy, *aux, *saved, *experts, *options, *needs, True, plan
        )
        y, s = kernels.grouped_lora(x, a, b, None, given, weights, *experts, "none", plan)
        saved = x, a, b, s, given, weights
        more = kernels.grouped_lora_backward(dy, *saved, *experts, "none", *needs, plan)
        saved = x, a, b_nan, s, ones, weights
        clean = kernels.grouped_lora_backward(dy, *saved, *experts, "none", *needs, plan)
        yield [*out, *grads, y, s, *more, *clean]
    for form in () if case.shared_a else slots.FORMS[1:]:
        yield slots.results(kernels, slots.inputs_of(case, form, dtype), case, form)
    shifted = torch.cat([x, x], 1)[:, 1 : x.shape[1] + 1]  # rows start between two packs
    yield kernels.shrink(shifted, a, w)
    nothing = kernels.expand(logits, w[:, :0], None, None, None, dtype)
    yield [kernels.router_topk_backward(*aux, ids, weights, logits, *options), nothing]


def is_seen(kernels, clean, orders=("forward",)) -> bool:
    """Whether an output differs, or a sanitizer aborts, for one of these thread orders."""
    child = os.fork()
    if child == 0:
        signal.alarm(900)  # a loop that does not end is also detected
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for order in orders:
            os.environ["CUDA_SHIM_ORDER"] = order
            for some, expected in zip(outputs(kernels), clean, strict=True):
                if not all(map(torch.equal, some, expected)):
                    os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.cuda_shim.planted_bugs")
    parser.add_argument("pattern", nargs="?", default="", help="a pattern for the names of bugs")
    parser.add_argument("--step", type=int, default=1, help="run only every n-th bug")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN
    csrc = FOLDER / "planted"
    shutil.rmtree(csrc, ignore_errors=True)
    planted = plant(ROOT / "csrc", csrc)
    kernels = Kernels(build(csrc, sanitize=True))
    clean = list(outputs(kernels))
    assert all(t.isfinite().all() for some in clean for t in some)
    print(json.dumps(["nothing", not is_seen(kernels, clean, ORDERS)]), flush=True)
    experiments = [*enumerate(planted, 1), *barriers(csrc)]
    for first, second in experiments[:: args.step]:
        if isinstance(second, Mask):
            kernels.shim.cuda_shim_plant(first)
            name, orders = str(second), ORDERS[:1]
        else:
            kernels.shim.cuda_shim_plant(0)
            kernels.skip_barrier(first, second)
            name, orders = f"{first}:{second}: barrier{comment_at(csrc, first, second)}", ORDERS
        if re.search(args.pattern, name):
            print(json.dumps([name, is_seen(kernels, clean, orders)]), flush=True)


def comment_at(csrc, file, line):
    """The comment of a barrier, which distinguishes it from others in the file."""
    comment = (csrc / "cuda" / file).read_text().splitlines()[line - 1].partition("// ")[2]
    return f": {comment}" if comment else ""


if __name__ == "__main__":
    main()
