"""Which of the two ways to exploit the sparsity of H a call takes: a matter of backend and shapes.

rank_dense  S of all R rank rows is computed and the gate masks it in registers: bandwidth-bound, no gather.
segmented   only the rows of picked experts are computed: the work is that of K experts, whatever E is.

Letters: T tokens, E experts, K picked a token, R rank rows of all experts, W width of the saved S.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

RANK_DENSE = "rank_dense"
SEGMENTED = "segmented"


def choose(backend: str) -> str:
    """The plan a backend runs.

    The C++ kernels gather tokens by expert within a cache-sized block, which wins at every shape
    on a CPU; the Triton kernels and the reference are rank-dense.
    """
    return SEGMENTED if backend == "cpp" else RANK_DENSE


def saved_ranks(plan: str, offsets: Sequence[int], top_k: int, shared_a: bool) -> int:
    """Columns of the S kept for backward: (T, W).  Never a function of the routing.

    rank_dense keeps all rows of A; segmented keeps, for each of the K slots, as many columns as the
    largest rank, slot after slot. With a shared A both keep its r rows.
    """
    ranks = [stop - start for start, stop in pairwise(offsets)]
    if shared_a:
        return ranks[0]
    return sum(ranks) if plan == RANK_DENSE else top_k * max(ranks)
