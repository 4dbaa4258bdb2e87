"""Routers, one file each: who decides which experts a token takes, and with which weights."""

from .base import Router
from .per_task import PerTaskRouter
from .sequence import SequenceRouter
from .task import TaskRouter
from .token import TokenRouter
from .universal import UniversalRouter

__all__ = [
    "PerTaskRouter",
    "Router",
    "SequenceRouter",
    "TaskRouter",
    "TokenRouter",
    "UniversalRouter",
]
