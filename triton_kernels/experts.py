"""The experts as the launchers pass them to kernels.

Letters: E experts, R rank rows of all experts, r one expert's rank.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import triton

from .operands import rows_contiguous
from .write_table import write_table


class Experts(NamedTuple):
    """The experts, and a tile of ranks: TILE_E experts of TILE_R columns each, both powers of two."""

    a: torch.Tensor | None  # (R, D_in), or (r, D_in) shared
    b: torch.Tensor  # (R, D_out)
    scaling: torch.Tensor  # (E,)
    offsets: torch.Tensor | None  # (E+1,) int32, or None: every expert has `rank` rows
    rank: int
    TILE_E: int
    TILE_R: int
    shared_a: bool
    ranks: tuple[int, ...]

    @property
    def largest(self):
        return max(self.ranks)

    @property
    def own_columns(self):
        """Columns per expert in a tile of the segmented plan: no dot combines the columns of two experts.

        The order in which a token's experts are summed therefore does not depend on the rest of the tile.
        """
        return max(16, self.TILE_R)

    @property
    def fit_registers(self):
        """Whether S of all experts fits next to a dot's accumulators; if not, experts go a few at a time."""
        return self.TILE_E * self.TILE_R <= 256

    @property
    def options(self):
        TILE_E = self.TILE_E if self.fit_registers else max(1, 256 // self.TILE_R)
        return {"SHARED": self.shared_a, "TILE_E": TILE_E, "TILE_R": self.TILE_R}


def bundle_experts(a, b, scaling, offsets, shared_a):
    """At least 16 columns: a dot needs as many along K."""
    ranks = tuple(stop - start for start, stop in pairwise(offsets))
    TILE_E = triton.next_power_of_2(len(offsets) - 1)
    TILE_R = max(triton.next_power_of_2(max(ranks)), 16 // TILE_E)
    equal = len(set(ranks)) == 1
    return Experts(
        rows_contiguous(a),
        rows_contiguous(b),
        scaling,
        None if equal else write_table(offsets, b),
        max(ranks) if equal else 0,
        TILE_E,
        TILE_R,
        shared_a,
        ranks,
    )
