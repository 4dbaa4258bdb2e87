"""Writes a model card, README.md, next to a saved adapter.

It is not part of the adapter: no loader reads it, and failing to write it is not an error.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from torch import nn

from .replace import replacing

NAME = "README.md"
_MISSING = "[More Information Needed]"  # the hub's placeholder for the author
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)

_CARD = """\
---
library_name: lora-moe
{yaml}license: unknown
tags:
- lora
- mixture-of-experts
---

# A mixture of LoRA experts for {base}

| | |
|---|---|
| base model | {base} |
| method | {method} |
| parameters | {parameters:,} |
| training data | {missing} |
| license | {missing} |
| saved by | lora-moe {version} |

## Loading this adapter

```python
from lora_moe import load_adapter
from transformers import AutoModelForCausalLM  # or the class of the base model

model = AutoModelForCausalLM.from_pretrained("{load}")
load_adapter(model, "this folder or repository")
```
"""

_WITH_PEFT = """

## Loading this adapter

This is a mixture of LoRA experts, which the package `lora-moe` adds to PEFT as the method LORA_MOE. Import
`lora_moe.peft` before PEFT reads the folder; without it PEFT says `KeyError: 'LORA_MOE'`:

```python
import lora_moe.peft  # noqa: F401  tells PEFT of the method
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("this folder or repository")
```

`lora_moe.load_adapter(base_model, folder)` reads it without PEFT.
"""


def write(folder: Path, model: nn.Module, layers: dict, parameters: int) -> None:
    """Write a model card for the layers {path: layer} of a model, unless README.md exists."""
    path = folder / NAME
    if not path.exists():
        with suppress(OSError), replacing(path) as file:
            file.write(card(model, layers, parameters).encode())


def card(model: nn.Module, layers: dict, parameters: int) -> str:
    from . import __version__  # the package imports this module

    name = _base_name(model)
    counts: dict[str, int] = {}
    for layer in layers.values():
        method = _method(layer.config)
        counts[method] = counts.get(method, 0) + 1
    return _CARD.format(
        yaml=f"base_model: {name}\n" if name else "",
        base=f"`{name}`" if name else _MISSING,
        load=name or _MISSING,
        method="; ".join(
            f"{method}, around {n} module{'s' * (n > 1)}" for method, n in counts.items()
        ),
        parameters=parameters,
        missing=_MISSING,
        version=__version__,
    )


def add_loading_with_peft(folder: str | os.PathLike) -> None:
    """Append the required import to PEFT's README.md, or to a new one, unless it is there."""
    path = Path(os.fspath(folder)) / NAME
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if "import lora_moe.peft" not in text:
        path.write_text(text.rstrip() + _WITH_PEFT, encoding="utf-8")


def _base_name(model):
    """The base model's name if it is one on the hub; local paths are private and not written."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return name if _HUB_NAME.fullmatch(name) and not os.path.exists(name) else ""


def _method(config):
    r = config.r
    rank = str(r) if isinstance(r, int) else f"{min(r)} to {max(r)}"
    if config.target_parameters:
        router = "the model's own router"
    elif config.router is not None:
        router = type(config.router).__name__
    else:
        router = f"top-{config.top_k} {config.gate}"
    middle = f", {type(config.middle).__name__}" if config.middle is not None else ""
    return f"{config.num_experts} experts of rank {rank}, {router}{middle}"
