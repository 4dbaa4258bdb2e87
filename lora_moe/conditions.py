"""Evaluates conditions in a forward's source that depend only on module attributes or argument defaults.

if self.pretraining_tp > 1 and self.slow_but_exact: ...     False if pretraining_tp is 1
"""

from __future__ import annotations

import ast
import inspect
import operator

from torch import nn

_COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


class Conditions:
    """Truth values of expressions in one method of a module.

    Args:
        module: its attributes are constants, except `training`.
        this: the method's name for its module, usually "self".
        defaults: known values of arguments.
    """

    def __init__(self, module: nn.Module, this: str = "self", defaults: dict | None = None):
        self._module, self._this, self._defaults = module, this, defaults or {}

    def truth(self, test: ast.expr) -> bool | None:
        """Whether the expression holds, or None if that is unknown."""
        try:
            return bool(self._value(test))
        except Exception:  # a missing attribute, values that do not compare
            return None

    def _value(self, node):
        if isinstance(node, ast.BoolOp):
            return self._junction(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self._value(node.operand)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self._value(node.left), self._value(node.comparators[0])
            return _COMPARE[type(node.ops[0])](left, right)
        if isinstance(node, ast.Name):
            return self._module if node.id == self._this else self._defaults[node.id]
        if isinstance(node, ast.Attribute):
            return _setting(self._value(node.value), node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "hasattr":
            return hasattr(self._value(node.args[0]), self._value(node.args[1]))
        return ast.literal_eval(node)

    def _junction(self, node):
        """`and`, `or`: one operand may decide even if another is unknown."""
        decides = isinstance(node.op, ast.Or)
        truths = [self.truth(operand) for operand in node.values]
        if decides in truths:
            return decides
        if None in truths:
            raise LookupError("not known")
        return not decides


def _setting(owner, name):
    is_property = isinstance(inspect.getattr_static(type(owner), name, None), property)
    if name == "training" or is_property:
        raise LookupError("not a setting")
    return getattr(owner, name)


def defaults_of(function: ast.FunctionDef) -> dict[str, object]:
    """{name: default} of the optional arguments that the function does not assign to."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    pairs = [*zip(reversed(arguments), reversed(function.args.defaults), strict=False)]
    pairs += zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    names = (node for node in ast.walk(function) if isinstance(node, ast.Name))
    assigned = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    return {
        argument.arg: default.value
        for argument, default in pairs
        if isinstance(default, ast.Constant) and argument.arg not in assigned
    }
