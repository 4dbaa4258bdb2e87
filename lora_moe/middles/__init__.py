"""Middles, one file each: what stands between lora_A and lora_B in place of the gate."""

from .core import CoreMiddle
from .slots import ModalSlotMiddle, SlotMiddle
from .unpaired import UnpairedMiddle

__all__ = ["CoreMiddle", "ModalSlotMiddle", "SlotMiddle", "UnpairedMiddle"]
