"""Finds the modules that match target_modules, and suggests names if nothing matches."""

from __future__ import annotations

import difflib
import re
import warnings

from torch import nn

from .all_linear import all_linear, candidates, in_short, is_all_linear
from .config import LoraMoeConfig
from .module_tree import Survey
from .unsupported import bypassed, reasons_of, why_not

__all__ = ["is_all_linear", "matches", "targets_of", "why_not"]


def targets_of(model: nn.Module, config: LoraMoeConfig) -> dict[str, nn.Module]:
    """{path: module} of the matching modules that are not excluded; raises if one is not supported.

    Warns about names that match no module, and modules that are not called in every branch.
    """
    _expect_regular_expressions(config)
    modules, survey = dict(model.named_modules(remove_duplicate=False)), Survey(model)
    excluded = {m for name, m in modules.items() if matches(name, config.exclude_modules)}
    if is_all_linear(config.target_modules):
        found = all_linear(survey, modules, excluded)
    else:
        named = {name: m for name, m in modules.items() if matches(name, config.target_modules)}
        found = {name: m for name, m in named.items() if name and m not in excluded}
    if not found:
        raise ValueError(_nothing(survey, modules, config))
    if not is_all_linear(config.target_modules):
        refuse("target_modules: expected linear modules", reasons_of(survey, found))
        _warn(_partly_called(survey, found))
    _warn(_unmatched(survey, modules, config))
    return found


def _expect_regular_expressions(config):
    for field in ("target_modules", "exclude_modules"):
        if isinstance(pattern := getattr(config, field), str):
            expect_regular_expression(field, pattern)


def expect_regular_expression(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        got = f"{pattern[:80]!r}: {error}"
        raise ValueError(f"{name}: expected a regular expression, got {got}") from None


def refuse(expected: str, reasons: dict[str, str]) -> None:
    """Raise ValueError with each path and reason, if there is any."""
    if reasons:
        listed = ", ".join(f"{path} ({reason})" for path, reason in reasons.items())
        raise ValueError(f"{expected}, got {listed}")


def matches(name: str, pattern) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == suffix or name.endswith("." + suffix) for suffix in pattern)


# --- messages ------------------------------------------------------------------------------------


def _warn(message):
    if message:
        warnings.warn(message, UserWarning, stacklevel=5)  # the caller of inject


def _unmatched(survey, modules, config):
    """One sentence that lists all names without a matching module."""
    parts = []
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field)
        if field == "target_modules" and is_all_linear(pattern):
            continue
        names = [pattern] if isinstance(pattern, str) else pattern
        for name in names:
            one = pattern if isinstance(pattern, str) else (name,)
            if name and not any(matches(path, one) for path in modules):
                parts.append(f"{field}: {name!r}{_hint(survey, modules, pattern, name)}")
    return parts and "no module matches " + "; ".join(parts)


def _partly_called(survey, found):
    readers = bypassed(survey, found)
    return readers and (
        "target_modules: experts do not run where the weight is read without calling the module,"
        f" in some branches: {in_short({p: f'in {c}' for p, c in readers.items()})}"
    )


def _hint(survey, modules, pattern, name):
    """A suggestion for a name or regular expression that matches nothing."""
    if isinstance(pattern, str):
        meant = _meant(modules, pattern)
        rule = "one string is a regular expression that must match the whole path"
        return f" ({rule}; did you mean {meant}?)" if meant else ""
    banks = (path for path, p in survey.model.named_parameters() if p.ndim >= 3)
    if any("expert" in path.lower() and matches(path, (name,)) for path in banks):
        return " (a parameter of fused experts: name it in target_parameters)"
    close = _closest(modules, name)
    return f" (did you mean {', '.join(map(repr, close))}?)" if close else ""


def _meant(modules, pattern):
    """A correction of a name without its tuple, or of a pattern without its prefix."""
    plain = re.fullmatch(r"[\w.]+", pattern)
    if any(re.fullmatch(rf"(.*\.)?({pattern})", path) for path in modules):
        return f"({pattern!r},)" if plain else repr(rf".*\.({pattern})")
    return plain and "".join(f"({name!r},)" for name in _closest(modules, pattern)[:1])


def _closest(modules, name):
    parts = name.count(".") + 1
    names = {".".join(path.split(".")[-n:]) for path in modules for n in (1, parts)} - {""}
    return difflib.get_close_matches(name, sorted(names), n=3)


def _nothing(survey, modules, config):
    pattern = config.target_modules
    names = [pattern] if isinstance(pattern, str) else list(pattern)
    hints = [hint for name in names if (hint := _hint(survey, modules, pattern, name))]
    linear = [path for path, reason in candidates(survey, modules, ()).items() if not reason]
    return (
        f"target_modules: expected at least one match, but nothing matches {pattern!r}"
        f"{''.join(hints)} (excluded: {config.exclude_modules!r}); linear modules here,"
        f" {len(linear)} in all: {', '.join(linear[:12])}"
    )
