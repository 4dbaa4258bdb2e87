"""Blocks of `use_routing` belong to a thread: asyncio tasks and generators that share one are refused."""

from __future__ import annotations

import sys

_NO_SWITCH = (
    "blocks belong to a thread, so its forwards may see another request's: no await or yield inside"
    " a block; run it with asyncio.to_thread, or open it around each forward"
)


def asyncio_task():
    """The task that runs now, None outside of asyncio."""
    asyncio = sys.modules.get("asyncio")
    loop = None if asyncio is None else asyncio._get_running_loop()
    return None if loop is None else asyncio.current_task(loop)


def expect_own_task(opened_in) -> None:
    """RuntimeError if the block that is open was opened in another task."""
    if opened_in is not None and opened_in is not asyncio_task():
        raise RuntimeError(f"use_routing: another asyncio task has a block open; {_NO_SWITCH}")


def expect_innermost(innermost: bool) -> None:
    """RuntimeError if a block ends before one that began inside it."""
    if not innermost:
        raise RuntimeError(f"use_routing: a block ended that was not the innermost; {_NO_SWITCH}")
