"""Which modules of a model a configuration names.

"all-linear" names every linear module except output embeddings, heads of classifiers and those
that cannot take experts, as in PEFT.
"""

from __future__ import annotations

import difflib
import logging
import re
import warnings

from torch import nn

from .config import LoraMoeConfig
from .layers import linear_features
from .unfit import Survey, why_not

__all__ = ["ALL_LINEAR", "targets_of", "why_not"]

ALL_LINEAR = "all-linear"
_CLASSIFIER = re.compile(
    r"For\w*(Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction|CTC|XVector)$"
)
# what is not worth a word where all is asked for
_NO_CANDIDATE = re.compile("already has experts|is not linear|cannot be replaced|PEFT has adapted")
_log = logging.getLogger(__name__)


def targets_of(model: nn.Module, config: LoraMoeConfig) -> dict[str, nn.Module]:
    """{path: module} of what the configuration names and does not exclude; raises if unfit.

    Warns of names that match no module, and of modules that are not called in every branch.
    """
    _expect_regular_expressions(config)
    modules, survey = dict(model.named_modules(remove_duplicate=False)), Survey(model)
    excluded = {m for name, m in modules.items() if matches(name, config.exclude_modules)}
    if is_all_linear(config.target_modules):
        found = _all_linear(survey, modules, excluded)
    else:
        named = {name: m for name, m in modules.items() if matches(name, config.target_modules)}
        found = {name: m for name, m in named.items() if name and m not in excluded}
    if not found:
        raise ValueError(_nothing(survey, modules, config))
    if not is_all_linear(config.target_modules):
        _refuse(survey.unfit(found))
        _warn(_partly_called(survey, found))
    _warn(_unmatched(survey, modules, config))
    return found


def _expect_regular_expressions(config):
    for field in ("target_modules", "exclude_modules"):
        pattern = getattr(config, field)
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"{field}: expected a regular expression, got {pattern[:80]!r}: {error}"
                ) from None


def _refuse(reasons):
    if reasons:
        listed = ", ".join(f"{path} ({reason})" for path, reason in reasons.items())
        raise ValueError(f"target_modules: expected linear modules, got {listed}")


def is_all_linear(target_modules) -> bool:
    names = (target_modules,) if isinstance(target_modules, str) else target_modules
    return [name.lower() for name in names] == [ALL_LINEAR]


def matches(name: str, pattern) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == suffix or name.endswith("." + suffix) for suffix in pattern)


# --- "all-linear" --------------------------------------------------------------------------------


def _all_linear(survey, modules, excluded):
    """Every linear module but heads, routers and those whose weight is read; tells which."""
    reasons = _candidates(survey, modules, excluded)
    skipped = {modules[path]: reason for path, reason in reasons.items() if reason}
    if told := {path: skipped[m] for path, m in modules.items() if m in skipped}:
        _log.info('"all-linear" leaves out %s', _in_short(told))
    return {path: modules[path] for path in reasons if modules[path] not in skipped}


def _candidates(survey, modules, excluded):
    """{path: reason to leave it out, or None} of all linear modules that have no experts yet."""
    linear = [path for path, m in modules.items() if path and m not in excluded and _has_sizes(m)]
    refused, partly = survey.unfit(linear), survey.bypassed(linear)
    heads = _heads(survey.model)
    reasons = {}
    for path in linear:
        reason = heads.get(modules[path]) or refused.get(path)
        if reason is None and path in partly:
            reason = f"{partly[path]} reads its weight in one of its branches"
        if reason is None or not _NO_CANDIDATE.search(reason):
            reasons[path] = reason
    return reasons


def _has_sizes(module):
    try:
        return linear_features(module) is not None
    except RuntimeError:  # a lazy module's weight has no shape yet
        return False


def _heads(model):
    """{module: what it is} of output embeddings and of what classifiers put on their base model."""
    heads = {}
    for module in model.modules():
        output = getattr(module, "get_output_embeddings", None)
        try:
            embeddings = output() if callable(output) else None
        except (AttributeError, NotImplementedError):  # a model without any
            embeddings = None
        if isinstance(embeddings, nn.Module):
            heads[embeddings] = "the output embedding"
        if any(_CLASSIFIER.search(c.__name__) for c in type(module).__mro__):
            base = set(getattr(module, "base_model", module).modules())
            heads |= {m: "a classifier's head" for m in module.modules() if m not in base}
    return heads


def _in_short(reasons):
    """One clause for each reason; a layer's number counts for nothing."""
    groups = {}
    for path, reason in reasons.items():
        groups.setdefault(reason, {})[re.sub(r"\d+(?=\.)", "*", path)] = None
    return "; ".join(f"{', '.join(paths)} ({reason})" for reason, paths in groups.items())


# --- what is told --------------------------------------------------------------------------------


def _warn(message):
    if message:
        warnings.warn(message, UserWarning, stacklevel=4)  # the caller of inject


def _unmatched(survey, modules, config):
    """One sentence that names every name without a module."""
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
    readers = survey.bypassed(found)
    return readers and (
        "target_modules: experts do not run where the weight is read without a call, which"
        f" happens in some branches: {_in_short({p: f'in {c}' for p, c in readers.items()})}"
    )


def _hint(survey, modules, pattern, name):
    """What may have been meant by a name, or by a regular expression, that matches nothing."""
    if isinstance(pattern, str):
        suffixed = any(re.fullmatch(rf"(.*\.)?({pattern})", path) for path in modules)
        plain = re.fullmatch(r"[\w.]+", pattern)
        meant = f"({pattern!r},)" if plain else repr(rf".*\.({pattern})")
        rule = " (one string is a regular expression that must match the whole path"
        return f"{rule}; did you mean {meant}?)" if suffixed else ""
    banks = (path for path, p in survey.model.named_parameters() if p.ndim == 3)
    if any(matches(path, (name,)) for path in banks):
        return " (a parameter of fused experts, which are not supported)"
    names = {path.rpartition(".")[2] for path in modules} - {""}
    depth = name.count(".") + 1
    names |= {".".join(path.split(".")[-depth:]) for path in modules} - {""}
    close = difflib.get_close_matches(name, sorted(names), n=3)
    return f" (did you mean {', '.join(map(repr, close))}?)" if close else ""


def _nothing(survey, modules, config):
    pattern = config.target_modules
    names = [pattern] if isinstance(pattern, str) else list(pattern)
    hints = [hint for name in names if (hint := _hint(survey, modules, pattern, name))]
    linear = [path for path, reason in _candidates(survey, modules, ()).items() if not reason]
    return (
        f"target_modules: expected to match a module, but nothing matches {pattern!r}"
        f"{''.join(hints)} (excluded: {config.exclude_modules!r}); linear modules here,"
        f" {len(linear)} in all: {', '.join(linear[:12])}"
    )
