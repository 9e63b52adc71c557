"""Formulas: sums of products of the plan's symbols, and of a few functions; they print themselves and have a value.

Terms:
    T, B, L, N4, NH   the plan's symbols: tokens, requests, wanted logits, completed windows
    C                 context: tokens of each request when the step ends
    rows(n, r)        compressed rows of ratio r that a token reads, at most n: min(n, position / r), averaged over the
                      step's tokens, each request's last T / B; rows(128, 1) is a window, rows(r) is all there are
    hit(n, k)         of n experts, those that some of T tokens chooses, k each, all equally likely: n (1 - (1 - k/n)^T)
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from atomc.artifact.expr import evaluate

Sizes = Mapping[str, float]
Atom = Callable[[Sizes], float]
Monomial = tuple[str, ...]
SYMBOLS: Final = ("T", "B", "L", "N4", "NH", "C")


@dataclass(frozen=True)
class Formula:
    """A sum of terms.

    Attributes:
        terms: product of atoms, in order -> coefficient. atoms: the atoms that are no symbols, by their text.
    """

    terms: Mapping[Monomial, float]
    atoms: Mapping[str, Atom] = field(default_factory=dict)

    def __add__(self, other: Formula | float) -> Formula:
        more, sums = formula(other), Counter(self.terms)
        for key, value in more.terms.items():
            sums[key] += value  # type: ignore[assignment]
        return Formula({k: v for k, v in sums.items() if v}, {**self.atoms, **more.atoms})

    def __mul__(self, other: Formula | float) -> Formula:
        more, products = formula(other), dict[Monomial, float]()
        for a, x in self.terms.items():
            for b, y in more.terms.items():
                key = tuple(sorted((*a, *b), key=_order))
                products[key] = products.get(key, 0) + x * y
        return Formula({k: v for k, v in products.items() if v}, {**self.atoms, **more.atoms})

    __radd__ = __add__
    __rmul__ = __mul__

    def at(self, sizes: Sizes) -> float:
        """The value for the sizes of a step, `C` among them."""
        total = 0.0
        for key, value in self.terms.items():
            total += value * math.prod(self.atoms[a](sizes) if a in self.atoms else sizes[a] for a in key)
        return total

    @property
    def constant(self) -> float | None:
        """Its value, if it is the same for all sizes."""
        return None if any(self.terms) else self.terms.get((), 0)

    def __str__(self) -> str:
        parts = []
        for key, value in sorted(self.terms.items(), key=lambda item: (-len(item[0]), [*map(_order, item[0])])):
            number = f"{value:.0f}" if value == int(value) else f"{value:.6g}"
            factors = [] if key and number in ("1", "-1") else [number]
            parts.append(("-" if key and number == "-1" else "") + "*".join([*factors, *key]))
        return " + ".join(parts).replace("+ -", "- ") or "0"


def _order(atom: str) -> tuple[int, str]:
    return (SYMBOLS.index(atom) if atom in SYMBOLS else len(SYMBOLS), atom)


def formula(value: Formula | float | str) -> Formula:
    """A number, an expression of a plan (`4*T`, `T//4 + B`), or a formula as it is."""
    if isinstance(value, Formula):
        return value
    if isinstance(value, str):
        return _parsed(ast.parse(value, mode="eval").body)
    return Formula({(): value} if value else {})


def _parsed(tree: ast.expr) -> Formula:
    match tree:
        case ast.Constant(value=int() as value):
            return formula(value)
        case ast.Name(id=name):
            return Formula({(name,): 1})
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _parsed(operand) * -1
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _parsed(left) + _parsed(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _parsed(left) + _parsed(right) * -1
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _parsed(left) * _parsed(right)
    text = ast.unparse(tree)  # // and %: a number as a whole
    return _atom(f"({text})", lambda sizes: evaluate(text, {k: int(v) for k, v in sizes.items()}))


def _atom(text: str, value: Atom) -> Formula:
    return Formula({(text,): 1}, {text: value})


def least(a: Formula | float, b: Formula | float) -> Formula:
    """The smaller of two."""
    x, y = formula(a), formula(b)
    if x.constant is not None and y.constant is not None:
        return formula(min(x.constant, y.constant))
    return _atom(f"min({x}, {y})", lambda sizes: min(x.at(sizes), y.at(sizes)))


def rows(most: int | None, ratio: int) -> Formula:
    """Rows that a token reads (see the module): at most `most`, of one row for every `ratio` tokens of its context."""
    name = f"rows({ratio})" if most is None else f"rows({most}, {ratio})"
    return _atom(name, lambda sizes: mean_rows(most, ratio, sizes["T"] / sizes["B"], sizes["C"]))


def mean_rows(most: int | None, ratio: int, tokens: float, context: float) -> float:
    """Mean of min(most, t // ratio), t = context - tokens + 1 .. context, where a row may be there in part."""

    def total(t: float) -> float:  # the integral of min(most, t / ratio) from 0
        full = math.inf if most is None else most * ratio
        return t * t / (2 * ratio) if t <= full else full * full / (2 * ratio) + (t - full) * full / ratio

    # Half a token later, so that one token of context t reads what it sees.
    return (total(context + 0.5) - total(context - tokens + 0.5)) / tokens


def hit(experts: int, chosen: int) -> Formula:
    """Distinct experts that T tokens choose (see the module); all, where a token has as many choices as there are."""
    missed = max(0.0, 1 - chosen / experts)
    return _atom(f"hit({experts}, {chosen})", lambda s: experts * (1 - missed ** s["T"]))
