"""What PEFT must know of the method: a member of its enum of methods, and its table of classes.

PEFT's register_peft_method takes the names that its enum has, and Python's enums are closed: the member is
made as enum.EnumType would have made it.  This is the only place that touches anything private of either.
"""

from __future__ import annotations

import enum
import re

try:
    import peft
except ImportError as error:
    raise ImportError("lora_moe.peft: expected PEFT to be installed; pip install peft") from error
from peft import PeftType

from ..peft_moe import PEFT_TYPE as NAME

# before 0.21 PEFT called model.forward, past the hooks that read the padding mask, and had no hook on saving
OLDEST = (0, 21)


def register(config_class: type, model_class: type) -> None:
    """Tell PEFT of the method, once in a process."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if member() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class)


def member() -> PeftType:
    """PeftType.LORA_MOE, made where PEFT does not have it."""
    return PeftType(NAME) if NAME in PeftType.__members__ else _extended(PeftType, NAME)


def _extended(cls: type[enum.Enum], name: str) -> enum.Enum:
    """A new member of an enum of strings, its name as its value."""
    new = str.__new__(cls, name)
    new._name_, new._value_, new.__objclass__ = name, name, cls
    new._sort_order_ = len(cls._member_names_)
    type.__setattr__(cls, name, new)  # past the enum's own, which knows no new members
    cls._member_map_[name] = new
    cls._member_names_.append(name)
    cls._value2member_map_[name] = new
    return new


def _expect_version():
    found = tuple(int(n) for n in re.findall(r"\d+", peft.__version__)[:2])
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"lora_moe.peft: expected PEFT {oldest} or later, got {peft.__version__};"
            f" pip install -U 'peft>={oldest}'"
        )


_expect_version()
member()
