"""Reads a compiled kernel's TTIR: which argument each load and store accesses, and which loops contain a dot.

Triton inlines every function before it writes TTIR, so one pass over the lines sees the whole kernel; a value
is defined before it is used.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

NAME = r"%[\w.$#-]+"
# operations that pass a pointer on; the second operand of addptr is an offset
POINTER = re.compile(
    r"tt\.(addptr|splat|broadcast|expand_dims|bitcast|reshape|trans|int_to_ptr)|scf\."
)
ACCESS = re.compile(
    r"tt\.(load|store|atomic_rmw|atomic_cas|descriptor_load|descriptor_store|descriptor_gather|descriptor_scatter)\b"
)
LOCATION = re.compile(
    r'^(#loc\d*) = loc\((?:"([^"]*)":(\d+):(\d+)|"[^"]*"\((#loc\d*)\)'
    r"|callsite\((#loc\d*) at (#loc\d*)\)|.*)\)$"
)


class Access(NamedTuple):
    """A load or store in the source: what it does, to which argument, and where, innermost call first."""

    kind: str
    argument: str
    where: tuple[tuple[str, int, int], ...]

    @property
    def reads(self):
        return "store" not in self.kind and "scatter" not in self.kind

    @property
    def writes(self):
        return not self.reads or "atomic" in self.kind


def accesses(text):
    """All accesses of a kernel, in order."""
    locations, roots, found = where_table(text), {}, []
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("tt.func"):
            roots |= {
                f"%{name}": name
                for name in re.findall(r"%([\w.$]+): !tt\.(?:ptr|tensordesc)", line)
            }
        elif access := ACCESS.search(line):
            pointer = re.search(NAME, line[access.end() :])
            found.append(
                Access(access.group(1), roots[root_name(pointer.group())], where(line, locations))
            )
        elif POINTER.search(line) and "ptr" in line:
            follow(line, roots)
    return found


def where(line, locations):
    """The location of a line, from the table, or from the line itself if nothing else uses it."""
    if match := re.search(r"loc\((#loc\d*)\)$", line):
        return locations.get(match.group(1), ())
    inline = re.search(r'"([^"]*)":(\d+):(\d+)\)+$', line)
    return ((Path(inline[1]).name, int(inline[2]), int(inline[3])),) if inline else ()


def follow(line, roots):
    """Records for an operation's results the argument that its pointer operands derive from."""
    results, _, right = line.partition(" = ")
    for inner, outer in re.findall(rf"({NAME}) = ({NAME})", right):  # iter_args(%p = %start)
        if root_name(outer) in roots:
            roots[inner] = roots[root_name(outer)]
    source = next(
        (roots[root_name(n)] for n in re.findall(NAME, right) if root_name(n) in roots), None
    )
    if source is not None and "scf.yield" not in line:
        roots[root_name(results.split(":")[0].strip())] = source


def root_name(value):
    """%p#1, one of several results of an operation, counts as %p: loops carry one pointer each."""
    return value.split("#")[0]


def where_table(text):
    """Location id -> ((file, line, column), ...), innermost call first."""
    lines = [m for line in text.splitlines() if (m := LOCATION.match(line))]
    table, waiting = {}, {m.group(1): m for m in lines}

    def resolve(key):
        if key not in table:
            match = waiting.get(key)
            _, file, line, column, named, callee, caller = match.groups() if match else (None,) * 7
            if file:
                table[key] = ((file.rsplit("/", 1)[-1], int(line), int(column)),)
            elif named:
                table[key] = resolve(named)
            else:
                table[key] = resolve(callee) + resolve(caller) if callee else ()
        return table[key]

    return {key: resolve(key) for key in waiting}


def loops_with_dots(text):
    """The number of innermost loops around a dot, and the number of dots."""
    stack, loops, dots = [], set(), 0
    for n, line in enumerate(text.splitlines()):
        if re.search(r"\bscf\.(for|while)\b", line):
            stack.append((n, len(line) - len(line.lstrip())))
        elif (
            stack
            and re.match(r"\s*}", line)
            and indent(line) == stack[-1][1]
            and " do {" not in line
        ):
            stack.pop()
        elif re.search(r"\btt\.dot(_scaled)?\b", line):
            dots += 1
            if stack:
                loops.add(stack[-1][0])
    return len(loops), dots


def indent(line):
    return len(line) - len(line.lstrip())


def float_atomics(text):
    """Read-modify-writes of floats; those built on compare-and-swap operate on a float's bits."""
    return len(re.findall(r"tt\.atomic_(?:rmw fadd|rmw .*: .*xf|cas)", text))
