"""Conditions on a point of the space, such as `model.router.top_k <= pool_size`: comparisons, + - * /, and, or, not."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


class Constraint:
    """A condition; its names are keys of the configuration, entries of the space, or `pool_size`."""

    def __init__(self, text: str):
        """Parse `text`.

        Raises:
            ValueError: It is not a condition.
        """
        self.text = text
        try:
            self._tree = ast.parse(text, mode="eval").body
        except SyntaxError as error:
            raise ValueError(f"constraints: {text!r} is not an expression: {error.msg}") from error
        self.names = sorted(self._check(self._tree))

    def holds(self, value_of: Callable[[str], Any]) -> bool:
        """Whether it is true where names have the values that `value_of` returns."""
        return bool(_evaluate(self._tree, value_of))

    def _check(self, node: ast.expr) -> set[str]:
        """Return the names in it, and refuse what a condition does not need."""
        match node:
            case ast.Name() | ast.Attribute():
                return {_dotted(node)}
            case ast.Constant():
                return set()
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.BoolOp(values=parts):
                pass
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=part):
                parts = [part]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                parts = [left, right]
            case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _COMPARE for op in ops):
                parts = [left, *rest]
            case _:
                raise ValueError(f"constraints: {self.text!r} may hold names, numbers, text, comparisons, + - * / only")
        return {name for part in parts for name in self._check(part)}


def _dotted(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{_dotted(value)}.{name}"
    raise ValueError("constraints: a dotted key begins with a name")


def _evaluate(node: ast.expr, value_of: Callable[[str], Any]) -> Any:
    match node:
        case ast.Name() | ast.Attribute():
            return value_of(_dotted(node))
        case ast.Constant(value=value):
            return value
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_evaluate(part, value_of) for part in parts]
        case ast.BoolOp(op=op, values=parts):
            found = (bool(_evaluate(part, value_of)) for part in parts)
            return all(found) if isinstance(op, ast.And) else any(found)
        case ast.UnaryOp(op=op, operand=part):
            value = _evaluate(part, value_of)
            return not value if isinstance(op, ast.Not) else -value
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_evaluate(left, value_of), _evaluate(right, value_of))
        case ast.Compare(left=left, ops=ops, comparators=rest):
            values = [_evaluate(part, value_of) for part in (left, *rest)]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
    raise AssertionError(node)
