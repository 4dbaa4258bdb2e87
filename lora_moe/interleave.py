"""Checks that `use_routing` blocks of asyncio tasks and generators do not interleave in one thread."""

from __future__ import annotations

import sys

_NO_SWITCH = (
    "blocks apply to the whole thread, so a forward could use another request's routing: do not await"
    " or yield inside a block; run it with asyncio.to_thread, or open one around each forward"
)


def asyncio_task():
    """The running asyncio task, or None."""
    asyncio = sys.modules.get("asyncio")
    loop = None if asyncio is None else asyncio._get_running_loop()
    return None if loop is None else asyncio.current_task(loop)


def expect_own_task(opened_in) -> None:
    """Raise RuntimeError if another task opened the current block."""
    if opened_in is not None and opened_in is not asyncio_task():
        raise RuntimeError(f"use_routing: another asyncio task has a block open; {_NO_SWITCH}")


def expect_innermost(innermost: bool) -> None:
    """Raise RuntimeError if a block ends before a block inside it."""
    if not innermost:
        raise RuntimeError(f"use_routing: a block ended before one inside it; {_NO_SWITCH}")
