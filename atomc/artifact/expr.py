"""Size expressions: integers, symbols, + - * // %. Parsed once, evaluated per step; nothing else is executable."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Set
from typing import Final

from atomc.errors import AtomcError

Evaluate = Callable[[Mapping[str, int]], int]
MAX_LENGTH: Final = 1000  # characters
MAX_DEPTH: Final = 256  # operators within one another: each is a call when the size is worked out
_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class ExpressionError(AtomcError):
    """A size expression that is not one."""


def parse(text: str, symbols: Set[str] | None = None) -> Evaluate:
    """A function from symbol values to the size. It cannot fail: divisors are positive constants.

    Args:
        symbols: the known names; None accepts any name.
    Raises:
        ExpressionError: anything but integers, known symbols and + - * // %.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"{text[:40]!r}… is not a size expression: {len(text)} characters, at most {MAX_LENGTH}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError(f"{text!r} is not a size expression: {error}") from error
    return _build(tree, text, symbols)


def _build(tree: ast.expr, text: str, symbols: Set[str] | None, depth: int = 0) -> Evaluate:
    if depth > MAX_DEPTH:
        raise ExpressionError(f"{text[:40]!r}… is not a size expression: it nests deeper than {MAX_DEPTH}")
    match tree:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return lambda _: value
        case ast.Name(id=name) if symbols is None or name in symbols:
            return lambda env: env[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _build(operand, text, symbols, depth + 1)
            return lambda env: -inner(env)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            if isinstance(op, (ast.FloorDiv, ast.Mod)):
                _positive(right, text)
            apply = _BINARY[type(op)]
            a, b = (_build(side, text, symbols, depth + 1) for side in (left, right))
            return lambda env: apply(a(env), b(env))
        case ast.Name(id=name):
            raise ExpressionError(f"{text!r} uses the unknown symbol {name!r}; known: {sorted(symbols or ())}")
    raise ExpressionError(f"{text!r} is not a size expression: only integers, symbols and + - * // % are")


def _positive(divisor: ast.expr, text: str) -> None:
    if not (isinstance(divisor, ast.Constant) and type(divisor.value) is int and divisor.value > 0):
        raise ExpressionError(f"{text!r} is not a size expression: // and % need a positive integer on the right")


def names_in(size: int | str) -> set[str]:
    """The symbols of a size that is an integer or an expression."""
    return set() if isinstance(size, int) else set(re.findall(r"[A-Za-z_]\w*", size))


def evaluate(size: int | str, symbols: Mapping[str, int]) -> int:
    """The value of a size that is an integer or an expression."""
    return size if isinstance(size, int) else parse(size)(symbols)
