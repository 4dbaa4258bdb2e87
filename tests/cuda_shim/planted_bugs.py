"""Would the tests see a missing bounds mask or barrier?  Each is removed, and some output must change.

    LD_PRELOAD=libasan.so python -m tests.cuda_shim.planted_bugs

The bugs all go into one build, with sanitizers, each behind a number that is switched on at run time; a
barrier is left out by its line.  Every experiment runs in a fork: an abort is a bug seen.
Prints a line for each: what it was, and whether it was seen.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ..cases import Case, sample
from .build import FOLDER, ROOT, Kernels, build

# Not here: what only saves work, as a return from blocks that would load and write nothing.
# file, a piece of it that is there once, the piece with the bug; BUG is true where it is switched on
BUGS = [
    ("numbers.h", "if (aligned && c + N <= end) return", "if (aligned && (BUG || c + N <= end)) return"),
    ("numbers.h", "c + i < end ? row", "(BUG || c + i < end) ? row"),
    ("numbers.h", "if (aligned && c + N <= end) {", "if (aligned && (BUG || c + N <= end)) {"),
    ("numbers.h", "if (c + i < end) row", "if (BUG || c + i < end) row"),
    ("product.h", "pack < kPacks && r < rows;", "pack < kPacks && (BUG || r < rows);"),
    ("product.h", "if (pack >= kPacks) continue", "if (!BUG && pack >= kPacks) continue"),
    ("product.h", "if (m + r >= M) return", "if (!BUG && m + r >= M) return"),
    ("shrink.h", "if (e >= E) break", "if (!BUG && e >= E) break"),
    ("shrink.h", "first + expert() >= E) return", "!BUG && first + expert() >= E) return"),
    ("shrink.h", "row(e < E ? e : 0)", "row(BUG || e < E ? e : 0)"),
    ("shrink.h", "if (t < p.tokens &&", "if ((BUG || t < p.tokens) &&"),
    ("shrink.h", "&& e < p.E) p.logits", "&& (BUG || e < p.E)) p.logits"),
    ("shrink.h", "p.stretch, p.columns)", "p.stretch, p.columns + (BUG ? 32 : 0))"),
    ("expand.cu", "if (t >= p.tokens) return", "if (!BUG && t >= p.tokens) return"),
    ("gram.cu", "p.stretch, p.tokens)", "p.stretch, p.tokens + (BUG ? 32 : 0))"),
    ("gram.cu", "if (i >= n) return", "if (!BUG && i >= n) return"),
    ("gating.h", "if (first + t < m.tokens)", "if (BUG || first + t < m.tokens)"),
    ("gating.h", "t < m.tokens; ++t) {\n    if", "(BUG || t < m.tokens); ++t) {\n    if"),
    ("gating.h", "t < m.tokens; ++t) {\n    gate", "(BUG || t < m.tokens); ++t) {\n    gate"),
    ("routing.h", "e >= 0 && e", "(BUG || e >= 0) && e"),
    ("routing.h", "&& e < E; }", "&& (BUG || e < E); }"),
    ("segmented.cu", "|| tile.e == p.experts.E) return", "|| (!BUG && tile.e == p.experts.E)) return"),
    ("segmented.cu", "if (r >= tile.count) return", "if (!BUG && r >= tile.count) return"),
    ("segmented.cu", "if (d >= columns) return", "if (!BUG && d >= columns) return"),
    ("segmented.cu", "if (t >= p.tokens) return", "if (!BUG && t >= p.tokens) return"),
    ("sort_slots.cu", "t < p.tokens && expert_of", "(BUG || t < p.tokens) && expert_of"),
    ("router.cu", "if (t >= tokens) return", "if (!BUG && t >= tokens) return"),
    ("router.cu", "if (i >= step) continue", "if (!BUG && i >= step) continue"),
]  # fmt: skip


def plant(csrc: Path, target: Path) -> None:
    """A copy of the sources with all bugs in it, switched off."""
    shutil.copytree(csrc, target, dirs_exist_ok=True)
    for number, (file, piece, wrong) in enumerate(BUGS, 1):
        path = target / "cuda" / file
        text = path.read_text()
        assert text.count(piece) == 1, (file, piece)
        path.write_text(
            text.replace(piece, wrong.replace("BUG", f"(cuda_shim::planted == {number})"))
        )


def barriers(csrc: Path) -> list[tuple[str, int]]:
    """File and line of every __syncthreads and __syncwarp."""
    return [
        (path.name, number)
        for path in sorted((csrc / "cuda").iterdir())
        if path.suffix in (".h", ".cu")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"__sync(threads|warp)\(\);", line)
    ]


SEED = torch.Generator().manual_seed
CASES = [  # each way through the kernels, none of whose tiles fit
    (Case("128 columns, scalar loads", 65, 7, 3, 17, 129, 65), torch.bfloat16),
    (Case("256 columns", 37, 3, 2, (70, 60, 50), 40, 72, with_bias=True), torch.float32),
    (Case("64 columns, aligned", 70, 5, 2, 8, 40, 72, shared_a=True), torch.float16),
    (Case("middle alone", 13, 70, 2, 4, 24, 24), torch.bfloat16),
]


def outputs(kernels) -> Iterator[list[torch.Tensor]]:
    """Of all operators, on every case and plan."""
    for case, dtype in CASES:
        yield from outputs_of(kernels, case, dtype)


def outputs_of(kernels, case, dtype):
    v = sample(case, dtype)
    x, w, a, b, base = (v[k] for k in ("x", "router_weight", "lora_A", "lora_B", "base"))
    experts = v["scaling"], case.offsets, case.shared_a
    options = case.gate, case.renormalize
    needs = [0], True, True, True, True
    router = case.K, *options, 0.9, 0.01
    given = torch.randint(-1, case.E + 1, (case.T, case.K), dtype=torch.int32, generator=SEED(0))
    given[::3, 1] = given[::3, 0]  # twice
    for plan in ("rank_dense", "segmented", "decode"):
        out = kernels.routed_lora(x, w, a, b, base, v["bias"], *experts, *router, plan)
        _, ids, weights, logits, mean_prob, lse, _, s = out
        aux = [t.cos() for t in (weights, logits, mean_prob, lse)]
        saved = x, w, a, b, s, ids, weights, logits
        dy = base.cos()
        grads = kernels.routed_lora_backward(dy, *aux, *saved, *experts, *options, *needs, plan)
        y, s = kernels.grouped_lora(x, a, b, None, given, weights, *experts, plan)
        saved = x, a, b, s, given, weights
        more = kernels.grouped_lora_backward(dy, *saved, *experts, *needs, plan)
        yield [*out, *grads, y, s, *more]
    yield [kernels.router_topk_backward(*aux, ids, weights, logits, *options)]


def is_seen(kernels, clean) -> bool:
    """Whether an output differs, or a sanitizer aborts, in either order of threads."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for order in ("forward", "reverse"):
            os.environ["CUDA_SHIM_ORDER"] = order
            for some, expected in zip(outputs(kernels), clean, strict=True):
                if not all(map(torch.equal, some, expected)):
                    os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN
    csrc = FOLDER / "planted"
    shutil.rmtree(csrc, ignore_errors=True)
    plant(ROOT / "csrc", csrc)
    kernels = Kernels(build(csrc, sanitize=True))
    clean = list(outputs(kernels))
    assert all(t.isfinite().all() for some in clean for t in some)
    print(json.dumps(["nothing", not is_seen(kernels, clean)]), flush=True)
    for number, (file, piece, _) in enumerate(BUGS, 1):
        kernels.shim.cuda_shim_plant(number)
        print(json.dumps([f"{file}: {piece}", is_seen(kernels, clean)]), flush=True)
    kernels.shim.cuda_shim_plant(0)
    for file, line in barriers(csrc):
        kernels.skip_barrier(file, line)
        print(json.dumps([f"{file}:{line}: barrier", is_seen(kernels, clean)]), flush=True)


if __name__ == "__main__":
    main()
