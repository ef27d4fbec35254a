"""Conditions on the columns of a table, written as text: ``age < 18 and city in ('Graz', 'Linz')``.

Only comparisons of columns with constants (or with other columns), ``and``, ``or``, ``not``, ``in`` and parentheses are
understood: the text is parsed, never evaluated as a program.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from expunge.core.errors import InputError, unknown

Mask = npt.NDArray[np.bool_]

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_REMEDY = "Write comparisons of columns with values, joined by and, or, not: \"age < 18 and city == 'Graz'\"."


def select(text: str, columns: Mapping[str, npt.NDArray[Any]]) -> Mask:
    """Which rows fulfil a condition, bool ``[n]``.

    Args:
        text: the condition.
        columns: arrays of equal length by name; a name that is no Python name is written in backticks.

    Raises:
        InputError: it cannot be read, names a column that does not exist, or compares what cannot be compared.
    """
    quoted = {f"_column_{i}": name for i, name in enumerate(columns)}
    for placeholder, name in quoted.items():
        text = text.replace(f"`{name}`", placeholder)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f"The condition {text!r} cannot be read.", _REMEDY) from None
    return _Reader(text, columns, quoted).mask(tree)


class _Reader:
    def __init__(self, text: str, columns: Mapping[str, npt.NDArray[Any]], quoted: Mapping[str, str]) -> None:
        self.text, self.columns, self.quoted = text, columns, quoted
        self.size = len(next(iter(columns.values()))) if columns else 0

    def mask(self, node: ast.AST) -> Mask:
        """The rows for which a truth value holds."""
        if isinstance(node, ast.BoolOp):
            parts = np.stack([self.mask(v) for v in node.values])
            return np.asarray(parts.all(axis=0) if isinstance(node.op, ast.And) else parts.any(axis=0))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.mask(node.operand)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = zip(sides, node.ops, sides[1:], strict=False)
            return np.asarray(np.stack([self._compare(a, op, b) for a, op, b in pairs]).all(axis=0))
        if isinstance(node, ast.Name):
            held = self._column(node.id)
            if held.dtype.kind == "b":
                return held
        raise self._refuse()

    def _compare(self, left: ast.AST, op: ast.cmpop, right: ast.AST) -> Mask:
        a = self._value(left)
        if isinstance(op, (ast.In, ast.NotIn)):
            if not isinstance(right, (ast.List, ast.Tuple, ast.Set)):
                raise self._refuse()
            inside = np.isin(np.asarray(a), np.array([self._constant(e) for e in right.elts]))
            return np.broadcast_to(inside if isinstance(op, ast.In) else ~inside, self.size)
        compare = _COMPARE.get(type(op))
        if compare is None:
            raise self._refuse()
        b = self._value(right)
        if (np.asarray(a).dtype.kind in "OSU") != (np.asarray(b).dtype.kind in "OSU"):
            raise InputError(f"The condition {self.text!r} compares text with numbers.", "Put text in quotes, and numbers not.")
        try:
            found = compare(a, b)
        except TypeError:
            raise InputError(f"The condition {self.text!r} compares values that have no order.", _REMEDY) from None
        return np.broadcast_to(np.asarray(found, dtype=bool), self.size)

    def _value(self, node: ast.AST) -> Any:
        return self._column(node.id) if isinstance(node, ast.Name) else self._constant(node)

    def _constant(self, node: ast.AST) -> Any:
        negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        inner = node.operand if isinstance(node, ast.UnaryOp) and negative else node
        if not isinstance(inner, ast.Constant) or not isinstance(inner.value, (str, int, float, bool)):
            raise self._refuse()
        if not negative:
            return inner.value
        if isinstance(inner.value, str):
            raise self._refuse()
        return -inner.value

    def _column(self, name: str) -> npt.NDArray[Any]:
        name = self.quoted.get(name, name)
        if name not in self.columns:
            raise unknown("column", name, self.columns)
        return self.columns[name]

    def _refuse(self) -> InputError:
        return InputError(f"The condition {self.text!r} is more than comparisons.", _REMEDY)
