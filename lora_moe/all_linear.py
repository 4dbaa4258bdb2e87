"""target_modules="all-linear": selects every linear module, with a few exceptions.

As in PEFT, output embeddings and classification heads are skipped.  So are the routers of the model's own
experts, and modules whose weight is read without calling the module.
"""

from __future__ import annotations

import logging
import re

from torch import nn

from .linear import linear_features
from .module_tree import Survey
from .unsupported import bypassed, reasons_of

ALL_LINEAR = "all-linear"
_CLASSIFIER = re.compile(
    r"For\w*(Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction|CTC|XVector)$"
)
# reasons that are not logged for "all-linear"
_NO_CANDIDATE = re.compile("already has experts|is not linear|cannot be replaced|PEFT has adapted")
_log = logging.getLogger(__name__)


def is_all_linear(target_modules: str | tuple[str, ...]) -> bool:
    names = (target_modules,) if isinstance(target_modules, str) else target_modules
    return [name.lower() for name in names] == [ALL_LINEAR]


def all_linear(
    survey: Survey, modules: dict[str, nn.Module], excluded: set[nn.Module]
) -> dict[str, nn.Module]:
    """{path: module} selected by "all-linear"; one log line lists what is skipped."""
    reasons = candidates(survey, modules, excluded)
    skipped = {modules[path]: reason for path, reason in reasons.items() if reason}
    if told := {path: skipped[m] for path, m in modules.items() if m in skipped}:
        _log.info('"all-linear" leaves out %s', in_short(told))
    return {path: modules[path] for path in reasons if modules[path] not in skipped}


def candidates(survey, modules, excluded):
    """{path: reason to skip it, or None} of all linear modules that have no experts yet."""
    linear = [path for path, m in modules.items() if path and m not in excluded and _has_sizes(m)]
    refused, partly = reasons_of(survey, linear), bypassed(survey, linear)
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
    except RuntimeError:  # the weight of a lazy module has no shape yet
        return False


def _heads(model):
    """{module: description} of output embeddings and of the modules outside a classifier's base model."""
    heads = {}
    for module in model.modules():
        output = getattr(module, "get_output_embeddings", None)
        try:
            embeddings = output() if callable(output) else None
        except (AttributeError, NotImplementedError):  # the model has none
            embeddings = None
        if isinstance(embeddings, nn.Module):
            heads[embeddings] = "the output embedding"
        if any(_CLASSIFIER.search(c.__name__) for c in type(module).__mro__):
            base = set(getattr(module, "base_model", module).modules())
            heads |= {m: "a classifier's head" for m in module.modules() if m not in base}
    return heads


def in_short(reasons):
    """One clause per reason; paths that differ only in the layer number are merged."""
    groups = {}
    for path, reason in reasons.items():
        groups.setdefault(reason, {})[re.sub(r"\d+(?=\.)", "*", path)] = None
    return "; ".join(f"{', '.join(paths)} ({reason})" for reason, paths in groups.items())
