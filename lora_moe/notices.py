"""Warnings that a process gives once: what a user set up and will not get."""

from __future__ import annotations

import warnings

told: set[str] = set()  # kinds of notices that were given


def tell_once(kind: str, message: str) -> None:
    if kind not in told:
        told.add(kind)
        warnings.warn(f"lora_moe: {message}", UserWarning, stacklevel=3)
