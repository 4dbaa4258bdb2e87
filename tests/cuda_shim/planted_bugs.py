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
from pathlib import Path

import torch

from ..cases import Case, sample
from .build import FOLDER, ROOT, Kernels, build

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
    ("shrink.h", "if (t < M &&", "if ((BUG || t < M) &&"),
    ("shrink.h", "&& e < E) logits", "&& (BUG || e < E)) logits"),
    ("shrink.h", "p.stretch, p.columns)", "p.stretch, p.columns + (BUG ? 32 : 0))"),
    ("expand.cu", "if (t >= p.tokens) return", "if (!BUG && t >= p.tokens) return"),
    ("gram.cu", "p.stretch, p.tokens)", "p.stretch, p.tokens + (BUG ? 32 : 0))"),
    ("gram.cu", "if (i >= n) return", "if (!BUG && i >= n) return"),
    ("gating.h", "&& first + warp * kGroup < m.tokens", "&& (BUG || first + warp * kGroup < m.tokens)"),
    ("gating.h", "if (e < 0 ||", "if ((!BUG && e < 0) ||"),
    ("gating.h", "|| e >= experts.E) return", "|| (!BUG && e >= experts.E)) return"),
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


CASES = [  # each way through the kernels, none of whose tiles fit
    (Case("128 columns, scalar loads", 65, 7, 3, 17, 129, 65), torch.bfloat16),
    (Case("256 columns", 37, 3, 2, (70, 60, 50), 40, 72, with_bias=True), torch.float32),
    (Case("64 columns, aligned", 70, 5, 2, 8, 40, 72, shared_a=True), torch.float16),
    (Case("middle alone", 13, 70, 2, 4, 24, 24), torch.bfloat16),
]


def outputs(kernels) -> list[torch.Tensor]:
    """Of all operators, on every case."""
    return [out for case, dtype in CASES for out in outputs_of(kernels, case, dtype)]


def outputs_of(kernels, case, dtype):
    v = sample(case, dtype)
    x, w, a, b, base = (v[k] for k in ("x", "router_weight", "lora_A", "lora_B", "base"))
    experts = v["scaling"], case.offsets, case.shared_a
    options = case.gate, case.renormalize
    needs = [0], True, True, True, True, "rank_dense"
    router = case.K, *options, 0.9, 0.01
    out = kernels.routed_lora(x, w, a, b, base, v["bias"], *experts, *router, "rank_dense")
    _, ids, weights, logits, mean_prob, lse, _, s = out
    aux = [t.cos() for t in (weights, logits, mean_prob, lse)]
    saved = s, ids, weights
    dy = base.cos()
    grads = kernels.routed_lora_backward(
        dy, *aux, x, w, a, b, *saved, logits, *experts, *options, *needs
    )
    given = ids.clone()
    given[::3, 0], given[1::3, 1], given[2::3, 0] = -1, given[1::3, 0], case.E
    grouped = kernels.grouped_lora(x, a, b, None, given, weights, *experts, "rank_dense")
    more = kernels.grouped_lora_backward(dy, x, a, b, s, given, weights, *experts, *needs)
    alone = kernels.router_topk_backward(*aux, ids, weights, logits, *options)
    return [*out, *grads, *grouped, *more, alone]


def is_seen(kernels, clean) -> bool:
    """Whether an output differs, or a sanitizer aborts, in either order of threads."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        same = True
        for order in ("forward", "reverse"):
            os.environ["CUDA_SHIM_ORDER"] = order
            same = same and all(map(torch.equal, outputs(kernels), clean))
        os._exit(0 if same else 1)
    return os.waitpid(child, 0)[1] != 0


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty holds NaN
    csrc = FOLDER / "planted"
    shutil.rmtree(csrc, ignore_errors=True)
    plant(ROOT / "csrc", csrc)
    kernels = Kernels(build(csrc, sanitize=True))
    clean = outputs(kernels)
    assert all(t.isfinite().all() for t in clean)
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
