"""A module's position in its model: its ancestors, and cached analyses of their forwards.

The holders of a module are its ancestors: its parent, the parent's parent, up to the model.
"""

from __future__ import annotations

import functools

from torch import nn

from .forwards import Forward


class Survey:
    """Cached lookups in a model, which must not change meanwhile."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.forward_of = functools.cache(Forward)

    @functools.cached_property
    def holders_of(self) -> dict[nn.Parameter, list[tuple[str, nn.Module]]]:
        """{parameter: [(module path, module)]}"""
        holders = {}
        for path, module in self.model.named_modules():
            for parameter in module._parameters.values():
                holders.setdefault(parameter, []).append((path, module))
        return holders


class Place:
    """A module and its ancestors.

    Attributes:
        holders: [(path from the ancestor to the module, ancestor)], the root first.
        parent: the last ancestor.
        chain: all ancestors and the module.
    """

    def __init__(self, survey: Survey, path: str):
        self.survey, self.path, self.module = survey, path, survey.model
        self.holders = []
        for rest in _rests(path):
            self.holders.append((rest, self.module))
            self.module = getattr(self.module, rest.partition(".")[0])
        self.parent = self.holders[-1][1] if self.holders else None
        self.chain = [holder for _, holder in self.holders] + [self.module]

    def forward_of(self, module: nn.Module) -> Forward:
        return self.survey.forward_of(module)


def _rests(path):
    """The path and its suffixes: for a.b.c these are a.b.c, b.c and c."""
    while path:
        yield path
        path = path.partition(".")[2]
