"""Size expressions: integers, symbols, + - * // %. Parsed once, evaluated per step; nothing else is executable."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

from atomc.errors import AtomcError

Evaluate = Callable[[Mapping[str, int]], int]
_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class ExpressionError(AtomcError):
    """A size expression that is not one."""


def parse(text: str, symbols: frozenset[str] | None = None) -> Evaluate:
    """A function from symbol values to the size.

    Args:
        symbols: the known names; None accepts any name.
    Raises:
        ExpressionError: anything but integers, known symbols and + - * // %.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ExpressionError(f"{text!r} is not a size expression: {error}") from error
    return _build(tree, text, symbols)


def _build(tree: ast.expr, text: str, symbols: frozenset[str] | None) -> Evaluate:
    match tree:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return lambda _: value
        case ast.Name(id=name) if symbols is None or name in symbols:
            return lambda env: env[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _build(operand, text, symbols)
            return lambda env: -inner(env)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            apply = _BINARY[type(op)]
            a, b = _build(left, text, symbols), _build(right, text, symbols)
            return lambda env: apply(a(env), b(env))
        case ast.Name(id=name):
            raise ExpressionError(f"{text!r} uses the unknown symbol {name!r}; known: {sorted(symbols or ())}")
    raise ExpressionError(f"{text!r} is not a size expression: only integers, symbols and + - * // % are")


def evaluate(size: int | str, symbols: Mapping[str, int]) -> int:
    """The value of a size that is an integer or an expression."""
    return size if isinstance(size, int) else parse(size)(symbols)
