"""Mutants of Python and of `@triton.jit` bodies, from the syntax tree, except strings and annotations.

compare       < and <=, > and >=, == and !=, in and not in, is and is not
arithmetic    + and -, * and +, / and *, // and *, % and //, & and |, << and >>
logic         and and or; not dropped; the test of an if, a while or a ternary negated
constant      n + 1 and n - 1, True and False
bound         min and max
statement     a call statement, a raise or an augmented assignment dropped
argument      a keyword argument dropped (mask=, other=)
cast          .to(dtype) dropped, which 64-bit offsets depend on
stride        another stride of the same function
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise

from .mutants import Mutant, named

COMPARE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
COMPARE |= {"in": "not in", "not in": "in", "is": "is not", "is not": "is"}
ARITHMETIC = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "//", "&": "|", "|": "&"}
ARITHMETIC |= {"<<": ">>", ">>": "<<", "@": None, "^": "|", "**": "*"}
BOUNDS = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
OPERATOR = re.compile(r"not\s+in|is\s+not|in|is|and|or|//|\*\*|<<|>>|[<>=!]=|[-+*/%&|^@<>]")


class Source:
    """A file's text, its syntax tree, and the byte positions of the nodes."""

    def __init__(self, file: str, source: bytes):
        self.file, self.bytes = file, source
        self.tree = ast.parse(source)
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node) -> tuple[int, int]:
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def text(self, node) -> str:
        begin, end = self.span(node)
        return self.bytes[begin:end].decode()

    def change(self, span, new, kind) -> Mutant:
        line = self.bytes.count(b"\n", 0, span[0]) + 1
        return Mutant(self.file, *span, new, kind, line)


def mutants(file: str, source: bytes) -> list[Mutant]:
    """All mutants of a file that are valid Python."""
    whole = Source(file, source)
    found = [mutant for node in _nodes(whole.tree) for mutant in _of(node, whole)]
    return named((m for m in found if _parses(m.apply(source))), source)


def _parses(source):
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _nodes(node, strides=()) -> Iterator:
    """Nodes, without annotations, decorators, strings, __all__ and error messages."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            inside = strides
            if isinstance(child, ast.FunctionDef):
                arguments = child.args.posonlyargs + child.args.args + child.args.kwonlyargs
                inside = [a.arg for a in arguments if a.arg.startswith("stride")]
            child.strides = inside
            yield child
            yield from _nodes(child, inside)


def _of(node, source) -> Iterator[Mutant]:
    for kind in (_operators, _constants, _tests, _calls, _statements, _strides):
        yield from kind(node, source)


def _operators(node, source):
    if isinstance(node, ast.Compare):
        operands, table, kind = [node.left, *node.comparators], COMPARE, "compare"
    elif isinstance(node, ast.BinOp):
        operands, table, kind = [node.left, node.right], ARITHMETIC, "arithmetic"
    elif isinstance(node, ast.BoolOp):
        operands, table, kind = node.values, {"and": "or", "or": "and"}, "logic"
    else:
        return
    if any(isinstance(o, ast.Constant) and isinstance(o.value, str) for o in operands[:1]):
        return  # string concatenation
    for left, right in pairwise(operands):
        begin, end = source.span(left)[1], source.span(right)[0]
        found = OPERATOR.search(source.bytes[begin:end].decode())
        new = found and table.get(" ".join(found[0].split()))
        if new:
            yield source.change((begin + found.start(), begin + found.end()), new, kind)


def _constants(node, source):
    if not isinstance(node, ast.Constant) or isinstance(node.value, (str, bytes, type(None))):
        return
    if isinstance(node.value, bool):
        yield source.change(source.span(node), str(not node.value), "constant")
    elif isinstance(node.value, int):
        for value in (node.value + 1, node.value - 1):
            new = str(value) if value >= 0 else f"({value})"
            yield source.change(source.span(node), new, "constant")
    elif isinstance(node.value, float):
        yield source.change(source.span(node), repr(node.value * 2 or 1.0), "constant")


def _tests(node, source):
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield source.change(source.span(node), f"({source.text(node.operand)})", "logic")
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)) and not isinstance(
        node.test, ast.Compare
    ):
        yield source.change(source.span(node.test), f"(not ({source.text(node.test)}))", "logic")


def _calls(node, source):
    if not isinstance(node, ast.Call):
        return
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    if name in BOUNDS:
        end = source.span(called)[1]
        yield source.change((end - len(name), end), BOUNDS[name], "bound")
    if name == "to" and isinstance(called, ast.Attribute):
        yield source.change(source.span(node), source.text(called.value), "cast")
    for keyword in node.keywords:
        if keyword.arg is not None:
            begin, end = source.span(keyword)
            rest = re.match(rb"\s*,?", source.bytes[end:])
            yield source.change((begin, end + rest.end()), "", "argument")


def _statements(node, source):
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if call or isinstance(node, (ast.Raise, ast.AugAssign)):
        yield source.change(source.span(node), "pass", "statement")


def _strides(node, source):
    if isinstance(node, ast.Name) and node.id in node.strides and len(node.strides) > 1:
        other = node.strides[(node.strides.index(node.id) + 1) % len(node.strides)]
        yield source.change(source.span(node), other, "stride")
