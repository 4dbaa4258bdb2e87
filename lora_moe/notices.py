"""Warnings that are given once per process."""

from __future__ import annotations

import warnings

told: set[str] = set()  # kinds of warnings already given


def tell_once(kind: str, message: str) -> None:
    if kind not in told:
        told.add(kind)
        warnings.warn(f"lora_moe: {message}", UserWarning, stacklevel=3)
