"""Static analysis of a module's forward: which children it calls, and whose weights it reads directly.

A module that passes a child's weight to a kernel instead of calling the child bypasses whatever replaces
the child.  Only the source of its forward shows that.

Conditions on the module's attributes (`if self.pretraining_tp > 1`) or on optional arguments, which are
assumed to have their defaults, are evaluated, and only the branch that is taken is analyzed.  Without
source, as in an interactive session, nothing is found.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from typing import NamedTuple

from torch import nn

from .conditions import Conditions, defaults_of

# attributes of a weight that do not depend on its values
_METADATA = {
    "data_ptr", "device", "dim", "dtype", "element_size", "get_device", "is_cuda", "is_meta",
    "is_floating_point", "layout", "ndim", "new_empty", "new_full", "new_ones", "new_tensor",
    "new_zeros", "numel", "requires_grad", "shape", "size", "stride",
}  # fmt: skip
_QUESTIONS = {"hasattr", "id", "isinstance", "print", "type"}  # functions that do not read values
_LIKENESS = {"to", "type_as"}  # x.to(weight) reads only dtype and device
_PRODUCTS = {"addmm", "baddbmm", "bmm", "einsum", "linear", "matmul", "mm", "tensordot"}
_WEIGHT = re.compile(r"(.+?)\.weight(?:\.(\w+).*)?")


class Forward(ast.NodeVisitor):
    """Analysis of a module's forward and of the methods that it calls on the module.

    Attributes:
        reads: paths relative to the module, such as "attention.out_proj" or "experts.*.w1", of children
            whose weight's values it reads.
        calls: paths of everything else that it uses, including children that it calls or passes on.
        multiplies: whether its own weight is a factor of a matrix product.
        returns_tuple: whether every reachable return gives a tuple.
        known: whether the source was found.
    """

    def __init__(self, module: nn.Module):
        self.reads: set[str] = set()
        self.calls: set[str] = set()
        self.multiplies = False
        self._module, self._seen, self._returns = module, set(), []
        self._names: dict[str, str] = {}  # local name: path from the module
        self._conditions = Conditions(module)
        self._returning = False
        self.known = self._method("forward")
        self.returns_tuple = bool(self._returns) and all(self._returns)

    def _method(self, name):
        """Visit a method of the instance or its class, and base class methods called through super()."""
        if name in self._seen:
            return False
        self._seen.add(name)
        outer, first = (self._names, self._conditions, self._returning), True
        for method in _definitions(self._module, name):
            self._names = {method.this: ""}
            # a helper's caller may pass other values than the defaults
            defaults = method.defaults if name == "forward" else {}
            self._conditions = Conditions(self._module, method.this, defaults)
            self._returning = name == "forward" and first
            self._block(method.body)
            first = False
            if not method.calls_super:
                break
        self._names, self._conditions, self._returning = outer
        return not first

    # --- statements: which are reachable ----------------------------------------------------------

    def _block(self, statements):
        """Visit statements up to a return or raise; True if there was one."""
        return any(self._statement(s) for s in statements)

    def _statement(self, node):
        if isinstance(node, ast.If):
            self.visit(node.test)
            truth = self._conditions.truth(node.test)
            ends = [truth is False or self._block(node.body)]
            ends.append(truth is True or self._block(node.orelse))
            # ignore the unreachable branch
            return ends[0] if truth is True else ends[1] if truth is False else all(ends)
        self.visit(node)
        return isinstance(node, ast.Return | ast.Raise)

    def visit_If(self, node):
        self._statement(node)

    def visit_IfExp(self, node):
        truth = self._conditions.truth(node.test)
        self.visit(node.test)
        if truth is not False:
            self.visit(node.body)
        if truth is not True:
            self.visit(node.orelse)

    def visit_FunctionDef(self, node):
        returning, self._returning = self._returning, False
        self._block(node.body)
        self._returning = returning

    def visit_Return(self, node):
        if self._returning:
            self._returns.append(isinstance(node.value, ast.Tuple))
        self.generic_visit(node)

    def visit_Assign(self, node):
        path = self._path(node.value)
        names = [t for t in node.targets if isinstance(t, ast.Name)]
        for target in names:
            self._names.pop(target.id, None)
            if path:
                self._names[target.id] = path
        if path is None or len(names) < len(node.targets):
            self.generic_visit(node)

    def visit_For(self, node):
        path = self._path(node.iter)
        if path is not None and isinstance(node.target, ast.Name):
            self._names[node.target.id] = f"{path}.*"
        self.generic_visit(node)

    # --- expressions: what is called, what is read ------------------------------------------------

    def visit_Call(self, node):
        if (path := self._path(node)) is not None:
            return self._use(path)
        name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        path = self._path(node.func)
        if path and "." not in path and self._is_method(path):
            self._method(path)
        elif path is not None:
            self._use(path.removesuffix(".forward"))
        else:
            self.visit(node.func)
        if name in _PRODUCTS:
            self.multiplies |= any(self._mentions_own_weight(a) for a in arguments)
        if name in _QUESTIONS or (name in _LIKENESS and len(arguments) == 1):
            arguments = [a for a in arguments if self._path(a) is None]
        for argument in arguments:
            self.visit(argument)
        return None

    def visit_BinOp(self, node):
        if isinstance(node.op, ast.MatMult):
            self.multiplies |= any(map(self._mentions_own_weight, (node.left, node.right)))
        self.generic_visit(node)

    def visit_Compare(self, node):
        if not all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            self.generic_visit(node)

    def visit_Attribute(self, node):
        path = self._path(node)
        if path is None:
            self.generic_visit(node)
        elif isinstance(node.ctx, ast.Load):
            self._use(path)

    visit_Name = visit_Subscript = visit_Attribute

    def _use(self, path):
        weight = _WEIGHT.fullmatch(path)
        if weight is None:
            self.calls.add(path)
        elif weight[2] not in _METADATA and not (weight[2] or "").startswith("_"):
            self.reads.add(weight[1])

    def _mentions_own_weight(self, node):
        return any(self._path(part) == "weight" for part in ast.walk(node))

    def _path(self, node):
        """The path relative to the module if the expression is one, else None."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id)
        owner, name = _member(node)
        path = owner and self._path(owner)
        if path is None or (name == "*" and path.endswith("weight")):
            return None  # a slice of a weight is not a module
        return f"{path}.{name}" if path else name

    def _is_method(self, name):
        static = inspect.getattr_static(self._module, name, None)
        return callable(static) and not isinstance(static, nn.Module)


def _member(node):
    """(owner, name) of  owner.name,  owner[i]  as "*",  getattr(owner, "name"); else (None, None)."""
    if isinstance(node, ast.Attribute):
        return node.value, node.attr
    if isinstance(node, ast.Subscript):
        return node.value, "*"
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "getattr":
        owner, name, *_ = node.args
        return (owner, name.value) if isinstance(name, ast.Constant) else (None, None)
    return None, None


class Method(NamedTuple):
    """A parsed method: statements, name of the self argument, defaults, whether it calls super()."""

    body: list[ast.stmt]
    this: str
    defaults: dict[str, object]
    calls_super: bool


def _definitions(module, name):
    """The method's definitions with source, in method resolution order."""
    for owner in (module, *type(module).__mro__):
        function = vars(owner).get(name)
        if function is None or owner is nn.Module or isinstance(function, staticmethod):
            continue
        function = inspect.unwrap(getattr(function, "__func__", function))
        code = getattr(function, "__code__", None)
        if code and (method := _parse(code)):
            yield method


@functools.lru_cache(maxsize=4096)
def _parse(code):
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # ValueError: more than one statement
        return None
    if not isinstance(node, ast.FunctionDef):
        return None
    this = next((a.arg for a in (*node.args.posonlyargs, *node.args.args)), "self")
    return Method(node.body, this, defaults_of(node), f"super().{node.name}(" in ast.unparse(node))
