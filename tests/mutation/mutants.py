"""A mutant: one small change to a source, with a name that remains valid after other edits to the file."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple


class Mutant(NamedTuple):
    """file[begin:end] in bytes becomes `new`."""

    file: str  # relative to the repository
    begin: int
    end: int
    new: str
    kind: str  # what was done: compare, arithmetic, constant, ...
    line: int  # from 1
    name: str = ""  # see named

    def apply(self, source: bytes) -> bytes:
        return source[: self.begin] + self.new.encode() + source[self.end :]


def named(mutants: Iterable[Mutant], source: bytes) -> list[Mutant]:
    """The mutants with names made of the changed line before and after; duplicates are numbered."""
    seen, out = Counter(), []
    for mutant in sorted(mutants, key=lambda m: (m.begin, m.end, m.new)):
        begin = source.rfind(b"\n", 0, mutant.begin) + 1
        end = source.find(b"\n", mutant.end)
        old = one_line(source[begin : end if end >= 0 else len(source)])
        new = one_line(mutant.apply(source)[begin : end + len(mutant.apply(source)) - len(source)])
        if old == new:
            continue
        name = f"{mutant.file}: {old} -> {new}"
        seen[name] += 1
        out.append(mutant._replace(name=name + (f" #{seen[name]}" if seen[name] > 1 else "")))
    return out


def one_line(text: bytes) -> str:
    return " ".join(text.decode().split())


def sample(mutants: list[Mutant], n: int, seed: int) -> list[Mutant]:
    """A random sample of n mutants, or all; it depends only on the seed."""
    shuffled = sorted(mutants, key=lambda m: m.name)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:n]


def is_wanted(pattern: str) -> Callable[[Mutant], bool]:
    return lambda mutant: re.search(pattern, mutant.file) is not None
