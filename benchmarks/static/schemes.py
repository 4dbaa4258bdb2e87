"""Bytes moved by other implementations of a mixture of LoRA experts: a small model of each.

A step is (what it does, launches, bytes).  Most bytes are passes over a (T, D) activation, or over K
of them if a step works on slots.

Letters: T tokens, E experts, K picked experts per token, r one expert's rank, D columns of x and of y.
"""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    T: int
    D: int
    E: int
    r: int
    K: int
    itemsize: int = 2

    @property
    def activation(self):
        return self.T * self.D * self.itemsize

    @property
    def slots(self):
        return self.K * self.activation

    @property
    def matrix(self):
        """A, or B, of all experts."""
        return self.E * self.r * self.D * self.itemsize

    @property
    def rank_space(self):
        return self.T * self.K * self.r * self.itemsize

    @property
    def router(self):
        return self.E * self.D * self.itemsize + 2 * self.T * self.E * 4


def minimum(s):
    """x is read once more, H is written and read in the base GEMM, which writes y anyway."""
    h = s.T * s.E * s.r * s.itemsize
    return [("router, shrink and gate", 1, s.activation + 2 * s.matrix + s.router + 2 * h)]


def minimum_backward(s):
    return [("dy to rank space, x to dA, dx", 1, 3 * s.activation + 4 * s.matrix + s.router)]


def eager(s):
    """for e in experts: y.index_add_(0, rows, x[rows] @ A[e] @ B[e] * gate * scale)"""
    return [
        ("router, softmax, top-k, renormalize, cast", 8, s.activation + s.router),
        ("zeros for the sum", 1, s.activation),
        ("eq, nonzero, gather of gates", 6 * s.E, 0),
        ("gather x", s.E, 2 * s.slots),
        ("x A", s.E, s.slots + s.matrix + s.rank_space),
        ("h B", s.E, s.slots + s.matrix + s.rank_space),
        ("times gate, times scale", 2 * s.E, 4 * s.slots),
        ("index_add", s.E, 3 * s.slots),
        ("add to the base", 1, 3 * s.activation),
    ]


def eager_backward(s):
    return [
        ("dy of the rows", s.E, 2 * s.slots),
        ("through scale and gate, and dgate", 5 * s.E, 8 * s.slots),
        ("dh, dB", 2 * s.E, 2 * s.slots + 2 * s.matrix),
        ("dx of the rows, dA", 2 * s.E, 2 * s.slots + 2 * s.matrix),
        ("added to dx", 2 * s.E, 3 * s.slots + s.activation),
        ("router", 8, 2 * s.activation + 2 * s.router),
    ]


def scattermoe(s):
    """Tokens sorted by expert; grouped GEMMs gather x and write outputs per slot (T, K, D); combined."""
    return [
        ("router, softmax, top-k", 3, s.activation + s.router),
        ("sort, offsets", 2, 4 * s.T * s.K * 8),
        ("grouped x A", 1, s.slots + s.matrix + s.rank_space),
        ("grouped h B", 1, s.slots + s.matrix + s.rank_space),
        ("weighted sum over slots", 1, s.slots + s.activation),
        ("add to the base", 1, 3 * s.activation),
    ]


def scattermoe_backward(s):
    return [
        ("dy times gate, grouped", 1, s.activation + s.slots),
        ("dgate from the saved outputs", 1, s.slots + s.activation),
        ("dh, dB", 2, 2 * s.slots + 2 * s.matrix),
        ("dx of the slots, dA", 2, 2 * s.slots + 2 * s.matrix),
        ("sum over slots", 1, s.slots + s.activation),
        ("router, added to dx", 5, 5 * s.activation + s.router),
    ]


def vllm(s):
    """vLLM's MoE LoRA kernels on a plain linear: one row per slot, outputs summed in a zeroed buffer."""
    return [
        ("router, softmax, top-k", 3, s.activation + s.router),
        ("align the blocks of experts", 2, 4 * s.T * s.K * 8),
        ("repeat x for each slot", 1, s.activation + s.slots),
        ("zeros", 2, s.slots + s.rank_space),
        ("shrink", 1, s.slots + s.matrix + s.rank_space),
        ("expand, added", 1, 2 * s.slots + s.matrix + s.rank_space),
        ("sum over slots", 1, s.slots + s.activation),
        ("add to the base", 1, 3 * s.activation),
    ]


def meteora(s):
    """One kernel for both matmuls: a program owns a slot and a tile of y, and recomputes x A for each."""
    return [
        ("router, softmax, top-k", 3, s.activation + s.router),
        ("x A B", 1, 2 * s.slots + 2 * s.matrix),
        ("times gate", 1, 2 * s.slots),
        ("sum over slots", 1, s.slots + s.activation),
        ("add to the base", 1, 3 * s.activation),
    ]


def meteora_in_l2(s, block_n=128):
    """Bytes from L2: A's rows and x are read again for every tile of y, B's rows once."""
    a = s.r * s.D * s.itemsize
    return s.T * s.K * (s.D // block_n * (a + s.D * s.itemsize) + a)


SCHEMES = {  # forward, and backward if there is one
    "minimum": (minimum, minimum_backward),
    "loop over experts, eager": (eager, eager_backward),
    "ScatterMoE, composed": (scattermoe, scattermoe_backward),
    "vLLM fused_moe_lora": (vllm, None),
    "MeteoRA": (meteora, None),
}


def total(steps):
    """(launches, bytes)."""
    return sum(n for _, n, _ in steps), sum(size for _, _, size in steps)
