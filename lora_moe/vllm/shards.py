"""Shard: the part of a bank of experts on each rank of a tensor-parallel layer.

    layer                 router W      A             B
    replicated            whole         whole         whole
    column, merged, QKV   whole         whole         the columns of this rank's outputs
    row                   cut on D_in   cut on D_in   whole; the logits are summed over the ranks

The experts are sharded like the base, so each rank adds their outputs to its own.

Letters: E experts, R rank rows of all experts together, D_in and D_out the whole linear's sizes.
"""

from __future__ import annotations

import dataclasses
from itertools import accumulate

import torch

KINDS = ("replicated", "column", "row")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One rank's part of a linear layer, which may fuse several projections.

    Args:
        kind: one of KINDS.
        rank, ranks: this rank, and the number of ranks that share the layer.
        D_in: width of the full input.
        widths: width of each projection's output on this rank.
        replicas: number of consecutive ranks with the same part of each projection, for example of a key or
            value head if there are more ranks than heads; if empty, 1 for each.
    Raises:
        ValueError: if an argument is invalid.
    """

    kind: str
    rank: int
    ranks: int
    D_in: int
    widths: tuple[int, ...]
    replicas: tuple[int, ...] = ()

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {self.kind!r}")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank: expected one of {self.ranks}, got {self.rank}")
        if not self.replicas:
            object.__setattr__(self, "replicas", (1,) * len(self.widths))
        if len(self.replicas) != len(self.widths) or any(self.ranks % n for n in self.replicas):
            raise ValueError(
                f"replicas: expected a divisor of {self.ranks} for each of {len(self.widths)}"
                f" projections, got {self.replicas}"
            )
        if self.kind == "row" and (len(self.widths) != 1 or self.D_in % self.ranks):
            raise ValueError(
                f"row: expected one projection and D_in divisible by {self.ranks} ranks, got"
                f" {len(self.widths)} and {self.D_in}"
            )

    @property
    def sums_logits(self) -> bool:
        """Whether ranks have only a part of the input, so logits are summed over the ranks."""
        return self.kind == "row" and self.ranks > 1

    @property
    def wholes(self) -> tuple[int, ...]:
        """Full D_out of each projection."""
        if self.kind != "column":
            return self.widths
        return tuple(w * self.ranks // n for w, n in zip(self.widths, self.replicas, strict=True))

    def D_out(self, index: int | None) -> int:
        """Width of the projection, or of all together for None."""
        return sum(self.wholes) if index is None else self.wholes[index]

    def outputs(self, index: int | None) -> tuple[int, int]:
        """[start, stop) of the projection in this rank's output; None is all of it."""
        if index is None:
            return 0, sum(self.widths)
        start = sum(self.widths[:index])
        return start, start + self.widths[index]

    def columns(self, index: int | None) -> list[tuple[int, int]]:
        """[start, stop) of this rank's columns in the projection, or in all together for None."""
        begins = [0, *accumulate(self.wholes)]
        every = range(len(self.widths)) if index is None else (index,)
        found = []
        for i in every:
            part = self.rank // self.replicas[i] if self.kind == "column" else 0
            start = part * self.widths[i] + (begins[i] if index is None else 0)
            found.append((start, start + self.widths[i]))
        return found

    def rows(self) -> tuple[int, int]:
        """[start, stop) of this rank's inputs in the whole input."""
        if self.kind != "row":
            return 0, self.D_in
        width = self.D_in // self.ranks
        return self.rank * width, (self.rank + 1) * width

    def cut(
        self, index: int | None, router: torch.Tensor, A: torch.Tensor, B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This rank's part of a bank, in its own memory.

        Args:
            index: which projection of the layer; None for one bank over all of them.
            router: (E, D_in).
            A: (R, D_in), or (r, D_in) shared.
            B: (R, D_out).
        Returns:
            router, A and B as in the table above.
        Raises:
            ValueError: if a width is not that of the full layer.
        """
        for name, got, expected in (
            ("router_weight", router.shape[1], self.D_in),
            ("lora_A", A.shape[1], self.D_in),
            ("lora_B", B.shape[1], self.D_out(index)),
        ):
            if got != expected:
                raise ValueError(f"{name}: expected {expected} columns, got {got}")
        start, stop = self.rows()
        B = torch.cat([B[:, i:j] for i, j in self.columns(index)], 1)
        return router[:, start:stop].clone(), A[:, start:stop].clone(), B.contiguous()
