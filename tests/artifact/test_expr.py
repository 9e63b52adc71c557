"""Size expressions: they mean what Python means, and nothing else parses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomc.artifact.expr import ExpressionError, evaluate, parse

SYMBOLS = {"T": 11, "B": 3, "N4": 5}
ATOMS = st.sampled_from(["T", "B", "N4"]) | st.integers(0, 99).map(str)


def joined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.tuples(parts, st.sampled_from("+-*"), parts).map(lambda p: f"({p[0]} {p[1]} {p[2]})")
    divided = st.tuples(parts, st.sampled_from(["//", "%"]), st.integers(1, 9)).map(lambda p: f"({p[0]} {p[1]} {p[2]})")
    return binary | divided | parts.map(lambda p: f"-{p}")


@given(st.recursive(ATOMS, joined, max_leaves=8))
def test_it_means_what_python_means(text: str) -> None:
    assert evaluate(text, SYMBOLS) == eval(text, {}, SYMBOLS)


def test_an_integer_needs_no_parsing() -> None:
    assert evaluate(7, {}) == 7


@pytest.mark.parametrize(
    "text",
    [
        "", "T +", "T / 2", "T ** 2", "T // 0", "T // B", "T % 0", "4 // -2", "T.real", "f(T)", "T[0]", "1.5", "True",
        "'a'", "T if B else 1", "__import__('os')", "lambda: T", "(T, B)", "T and B", "Q", "T\x00",
        "(" * 150, "1+" * 5000, "1+" * 400 + "1", "-" * 300 + "T",
    ],
)  # fmt: skip
def test_nothing_else_parses(text: str) -> None:
    with pytest.raises(ExpressionError, match=r"size expression|unknown symbol"):
        parse(text, SYMBOLS.keys())
