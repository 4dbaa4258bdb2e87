"""Mutants of C++, many in one build: an environment variable selects the active one at run time.

    i < n      becomes   (lora_moe_mutant == 17 ? (i <= n) : (i < n))

compare       < and <=, > and >=, == and !=
arithmetic    + and -, * and +, / and *, % and *, += and -=
logic         && and ||, ! dropped, the branches of a ternary exchanged
constant      n + 1 and n - 1
bound         std::min and std::max
statement     an expression statement dropped

There are none where the language requires a constant (template arguments, constexpr, case, array sizes,
attributes): each of those would need a separate build.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from .mutants import Mutant, named

SWITCH = """#include <cstdlib>
inline const int lora_moe_mutant = [] {
  const char* chosen = std::getenv("LORA_MOE_MUTANT");
  return chosen ? std::atoi(chosen) : 0;
}();
"""
COMPARE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
ARITHMETIC = {"+": "-", "-": "+", "*": "+", "/": "*", "%": "*"}
LOGIC = {"&&": "||", "||": "&&"}
ASSIGN = {"+=": "-=", "-=": "+=", "*=": "+="}
CONSTANT = {  # contexts in which a value must be known to the compiler
    *(
        "template_argument_list",
        "template_parameter_list",
        "static_assert_declaration",
        "enumerator",
    ),
    *("requires_clause", "concept_definition", "attribute_declaration", "alignas_qualifier"),
    *("preproc_if", "preproc_elif", "preproc_def", "preproc_function_def", "preproc_call"),
    *(
        "array_declarator",
        "bitfield_clause",
        "decltype",
        "noexcept",
        "sizeof_expression",
        "alignas_specifier",
    ),
}


def mutants(file: str, source: bytes) -> list[Mutant]:
    return named(_walk(file, _parser().parse(source).root_node, source), source)


def _parser():
    import tree_sitter
    import tree_sitter_cpp

    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_cpp.language()))


def _walk(file, node, source) -> Iterator[Mutant]:
    for child in node.children:
        if child.type in CONSTANT and not child.type.startswith("preproc_if"):
            continue
        if _is_constexpr(child):
            continue
        if child.type.startswith("preproc_if") or child.type == "preproc_elif":
            inner = [
                c for i, c in enumerate(child.children) if child.field_name_for_child(i) is None
            ]
            for part in inner:  # not the condition
                yield from _of(file, part, source)
                yield from _walk(file, part, source)
            continue
        parts = [child]
        if child.type == "if_statement" and any(c.type == "constexpr" for c in child.children):
            parts = [c for c in child.children if c.type != "condition_clause"]
        elif child.type == "case_statement":
            parts = child.children[2:]
        for part in parts:
            yield from _of(file, part, source)
            yield from _walk(file, part, source)


def _is_constexpr(node):
    return node.type in ("declaration", "field_declaration", "function_definition") and any(
        c.type == "type_qualifier" and c.text in (b"constexpr", b"consteval", b"constinit")
        for c in node.children
    )


def _of(file, node, source) -> Iterator[Mutant]:
    def change(new, kind):
        line = node.start_point[0] + 1
        return Mutant(file, node.start_byte, node.end_byte, new, kind, line)

    def text(part):
        return source[part.start_byte : part.end_byte].decode()

    if node.type in ("binary_expression", "assignment_expression"):
        left, operator, right = (node.child_by_field_name(n) for n in ("left", "operator", "right"))
        tables = (
            (COMPARE, "compare"),
            (ARITHMETIC, "arithmetic"),
            (LOGIC, "logic"),
            (ASSIGN, "arithmetic"),
        )
        for table, kind in tables:
            if operator.type in table:
                yield change(f"{text(left)} {table[operator.type]} {text(right)}", kind)
    elif node.type == "unary_expression" and text(node).startswith("!"):
        yield change(text(node.child_by_field_name("argument")), "logic")
    elif node.type == "conditional_expression":
        parts = [node.child_by_field_name(n) for n in ("condition", "alternative", "consequence")]
        yield change("{} ? {} : {}".format(*map(text, parts)), "logic")
    elif node.type == "number_literal" and re.fullmatch(r"\d+", text(node)):
        yield change(f"{text(node)} + 1", "constant")
        yield change(f"{text(node)} - 1", "constant")
    elif node.type == "call_expression":
        called = node.child_by_field_name("function")
        swapped = {"std::min": "std::max", "std::max": "std::min"}.get(text(called).split("<")[0])
        if swapped:
            rest = source[called.start_byte + len("std::min") : node.end_byte].decode()
            yield change(swapped + rest, "bound")
    elif node.type == "expression_statement" and node.named_child_count:
        yield change(";", "statement")


def instrumented(source: bytes, chosen: dict[int, Mutant]) -> bytes:
    """The source with all chosen mutants of the file; line numbers are unchanged."""
    spans = defaultdict(list)
    for number, mutant in chosen.items():
        spans[(mutant.begin, mutant.end)].append((number, mutant))
    return _render(source, 0, len(source), sorted(spans.items(), key=lambda s: (s[0][0], -s[0][1])))


def _render(source, begin, end, spans) -> bytes:
    out, at = b"", begin
    while spans:
        ((first, last), alive), *spans = spans
        inner = [s for s in spans if s[0][1] <= last]
        spans = spans[len(inner) :]
        original = _render(source, first, last, inner)
        out += source[at:first] + _choice(original, alive)
        at = last
    return out + source[at:end]


def _choice(original, alive):
    if alive[0][1].kind == "statement":
        ((number, _),) = alive
        return b"if (lora_moe_mutant != %d) { " % number + original + b" }"
    tests = b"".join(b"lora_moe_mutant == %d ? (%b) : " % (n, one_line(m.new)) for n, m in alive)
    return b"(" + tests + b"(" + original + b"))"


def one_line(text: str) -> bytes:
    return " ".join(re.sub(r"//[^\n]*", "", text).split()).encode()
