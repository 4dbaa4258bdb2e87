"""Middles, one per file: they replace the gate between lora_A and lora_B."""

from .core import CoreMiddle
from .mixed import MixedMiddle
from .slots import ModalSlotMiddle, SlotMiddle
from .unpaired import UnpairedMiddle

__all__ = ["CoreMiddle", "MixedMiddle", "ModalSlotMiddle", "SlotMiddle", "UnpairedMiddle"]
