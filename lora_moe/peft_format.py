"""Reads folders saved by PEFT, without PEFT and as untrusted input.

    adapter_config.json        {"peft_type": ..., the fields of the method's configuration}
    adapter_model.safetensors  base_model.model.<module path>.<tensor of the method>

PEFT's patterns are regular expressions.  One from a file could take minutes to match, so patterns with
    repeated groups or many repetitions raise.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import repr as brief

from torch import nn

from . import safefile
from .targets import expect_regular_expression

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (WEIGHTS, CONFIG)
PREFIX = "base_model.model."
MAX_CONFIG = 4 << 20  # bytes
MAX_PATTERNS = 2048
MAX_REPEATED = 16  # patterns with repetitions: checking a file takes under a second
_TOKEN = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|.", re.DOTALL)


def read_config(path: Path) -> dict:
    """The fields of an adapter_config.json.

    Raises:
        ValueError: if it is not a regular file, is too long, or is not a JSON object.
        OSError: if it cannot be read.
    """
    with safefile.open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_CONFIG:
            raise ValueError(f"{path}: expected at most {MAX_CONFIG} bytes, got {size}")
        fields = safefile.parse_json(file.read(), str(path))
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    return fields


def module_path(key: str) -> str:
    """A tensor's key without PEFT's prefix."""
    return key.removeprefix(PREFIX)


def shared(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """{path: clause for messages} of modules that have several names in the model.

    Experts apply under all names, PEFT's adapters only under the first.
    """
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    by_path = {name: same for same in names.values() if len(same) > 1 for name in same}
    return {
        path: f"it has the names {', '.join(by_path[path])}" for path in paths if path in by_path
    }


def expect_patterns(name: str, patterns) -> dict:
    """Check rank_pattern or alpha_pattern, {} for None; raises ValueError for unsafe patterns."""
    if patterns is None:
        return {}
    if not isinstance(patterns, Mapping) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(f"{name}: expected a dict with module names, got {brief(patterns)}")
    if len(patterns) > MAX_PATTERNS:
        raise ValueError(f"{name}: expected at most {MAX_PATTERNS} patterns, got {len(patterns)}")
    repeated = 0
    for pattern in patterns:
        repeated += _repetitions(name, pattern) > 0
        expect_regular_expression(name, pattern)
    if repeated > MAX_REPEATED:
        raise ValueError(
            f"{name}: expected at most {MAX_REPEATED} patterns with repetitions, got {repeated}"
        )
    return dict(patterns)


def _repetitions(name, pattern):
    """The number of repetitions; raises if matching could take more than cubic time."""
    tokens = _TOKEN.findall(pattern)
    count = sum(token in "*+{" for token in tokens)
    pairs = list(itertools.pairwise(tokens))
    group = any(a == ")" and b in "*+?{" for a, b in pairs)
    special = re.search(r"\(\?(?!:)|\\[1-9]", pattern)  # lookaround, flags, back references
    if len(pattern) > 1024 or count > 2 or group or special:
        raise ValueError(
            f"{name}: expected module names, or regular expressions with at most two repetitions and no"
            f" repeated group, got {brief(pattern)}"
        )
    return count


def matched(patterns: Mapping[str, object], path: str, default):
    """The value of the first pattern that matches the path's end after a dot, as in PEFT."""
    for pattern, value in patterns.items():
        if _ending(pattern).match(path):
            return value
    return default


def rank_at(config: Mapping, path: str):
    """r of a module, from rank_pattern or r."""
    return matched(config.get("rank_pattern") or {}, path, config.get("r", 8))


def alpha_at(config: Mapping, path: str):
    """lora_alpha of a module, from alpha_pattern or lora_alpha."""
    return matched(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8))


@functools.lru_cache(maxsize=2 * MAX_PATTERNS)
def _ending(pattern):
    return re.compile(rf"(.*\.)?({pattern})$")
