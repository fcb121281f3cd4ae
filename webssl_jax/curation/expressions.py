"""What may be written where records are chosen: an expression of columns of scores (numbers and the
signs + - * /), and a condition on them (comparisons, ``and``, ``or``, ``not`` besides)."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from webssl_jax.config import UserError
from webssl_jax.curation import scores

_SIGNS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
Columns = Mapping[str, np.ndarray]


class Expression:
    """A number of each record, in the words of the module.

    Args:
      flag: that gave the text, for messages.

    Raises:
      UserError: for a text that is none.
    """

    _dtype: type = np.float64
    _wanted = "is no number; give a column, or a sum of columns"

    def __init__(self, text: str, flag: str):
        self.text, self._where = text, f"{flag} {text!r}"
        try:
            self._tree = ast.parse(text, mode="eval").body
        except (SyntaxError, RecursionError, MemoryError) as error:  # the last of deep nesting
            raise UserError(f"{self._where}: {error}") from None
        self.columns = sorted({n.id for n in ast.walk(self._tree) if isinstance(n, ast.Name)})
        self(dict.fromkeys(self.columns, np.zeros(1)))  # refuses what it does not know

    def __call__(self, columns: Columns) -> np.ndarray:
        """(n,), of (n,) float64 columns. Division by 0 is no error: NaN, or infinite."""
        try:
            with np.errstate(divide="ignore", invalid="ignore"):
                found = self._value(self._tree, columns)
        except (TypeError, ArithmeticError, RecursionError) as error:
            raise UserError(
                f"{self._where}: cannot be computed ({error}); compare columns before and, or, "
                "not, and compute with numbers"
            ) from None
        if not isinstance(found, np.ndarray) or found.dtype != self._dtype:
            raise UserError(f"{self._where}: {self._wanted}")
        return found

    def _value(self, node: ast.AST, columns: Columns) -> Any:
        def value(part: ast.AST) -> Any:
            return self._value(part, columns)

        match node:
            case ast.Name(id=name):
                return columns[name]
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=part):
                return -value(part)
            case ast.UnaryOp(op=ast.Not(), operand=part):
                return ~value(part)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _SIGNS:
                return _SIGNS[type(op)](value(left), value(right))
            case ast.BoolOp(op=op, values=parts):
                joined = np.logical_and if isinstance(op, ast.And) else np.logical_or
                return joined.reduce([value(part) for part in parts])
            case ast.Compare(left=left, ops=ops, comparators=rights) if all(
                type(op) in _SIGNS for op in ops
            ):
                sides = [value(left), *map(value, rights)]
                pairs = zip(ops, sides, sides[1:], strict=False)
                return np.logical_and.reduce([_SIGNS[type(op)](a, b) for op, a, b in pairs])
        raise UserError(f"{self._where}: cannot read {ast.unparse(node)!r}")


class Condition(Expression):
    """Yes or no of each record."""

    _dtype = np.bool_
    _wanted = "is no condition; compare a column, as in x > 1"

    def __init__(self, text: str, flag: str = "--where"):
        super().__init__(text, flag)


def numbers(folder: Path, text: str, flag: str) -> np.ndarray:
    """(n,) float64 of an expression over all records of a folder of scores; NaN where there is no
    score.

    Raises:
      UserError: for a text that is no expression; as :func:`scores.tables`; for columns of texts.
    """
    wanted = Expression(text, flag)
    return wanted(scores.numbers([folder], wanted.columns))
