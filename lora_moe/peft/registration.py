"""Registers the method with PEFT: adds a member to its PeftType enum, and the classes to its tables.

PEFT's register_peft_method only accepts members of PeftType, and Python enums are closed, so the member is
created as enum.EnumType does.  Only this module uses private APIs for it.
"""

from __future__ import annotations

import enum
import re

try:
    import peft
except ImportError as error:
    raise ImportError("lora_moe.peft: requires PEFT; run pip install peft") from error
from peft import PeftType

from ..peft_moe import PEFT_TYPE as NAME

# before 0.21 PEFT bypassed hooks on the model's forward, and had no hook on saving
OLDEST = (0, 21)


def register(config_class: type, model_class: type) -> None:
    """Register the method with PEFT, once per process."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if member() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class)


def member() -> PeftType:
    """PeftType.LORA_MOE, created if PEFT does not have it."""
    return PeftType(NAME) if NAME in PeftType.__members__ else _extended(PeftType, NAME)


def _extended(cls: type[enum.Enum], name: str) -> enum.Enum:
    """Add a member to a string enum, with its name as value."""
    new = str.__new__(cls, name)
    new._name_, new._value_, new.__objclass__ = name, name, cls
    new._sort_order_ = len(cls._member_names_)
    type.__setattr__(cls, name, new)  # bypasses EnumType.__setattr__
    cls._member_map_[name] = new
    cls._member_names_.append(name)
    cls._value2member_map_[name] = new
    return new


def _expect_version():
    found = tuple(int(n) for n in re.findall(r"\d+", peft.__version__)[:2])
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"lora_moe.peft: requires PEFT {oldest} or later, got {peft.__version__};"
            f" run pip install -U 'peft>={oldest}'"
        )


_expect_version()
member()
