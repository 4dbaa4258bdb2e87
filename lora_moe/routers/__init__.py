"""Routers, one per file: they decide which experts a token uses, and with which weights."""

from .base import Router
from .factors import FactorRouter
from .generic import GenericRouter
from .hidden import HiddenRouter
from .noisy import NoisyRouter
from .per_task import PerTaskRouter
from .poly import PolyRouter
from .prefix import PrefixRouter
from .sequence import SequenceRouter
from .task import TaskRouter
from .threshold import ThresholdRouter
from .token import TokenRouter
from .universal import UniversalRouter

__all__ = [
    "FactorRouter",
    "GenericRouter",
    "HiddenRouter",
    "NoisyRouter",
    "PerTaskRouter",
    "PolyRouter",
    "PrefixRouter",
    "Router",
    "SequenceRouter",
    "TaskRouter",
    "ThresholdRouter",
    "TokenRouter",
    "UniversalRouter",
]
