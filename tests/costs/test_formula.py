"""Formulas: arithmetic, how they read, and the averages in them against sums over tokens."""

from __future__ import annotations

import pytest

from atomc.costs.formula import Formula, formula, hit, least, mean_rows, rows

T, B = formula("T"), formula("B")
SIZES = {"T": 12.0, "B": 3.0, "C": 100.0, "N4": 2.0}


@pytest.mark.parametrize(
    ("made", "text", "value"),
    [
        (formula("4*T + 8"), "4*T + 8", 56),
        (T * 2 + T * 3 + 1, "5*T + 1", 61),
        (T * (T + B) * 2, "2*T*T + 2*T*B", 2 * 12 * 15),
        (T + T * -1, "0", 0),
        (T * 1.5, "1.5*T", 18),
        (B * -1 + T, "T - B", 9),
        (formula("-(((-T)//16))") * 2, "-2*(-T // 16)", 2),
        (formula("T//4 + B"), "B + (T // 4)", 6),
        (least(formula(3), 7), "3", 3),
        (least(T * 10, B * 7), "min(10*T, 7*B)", 21),
        (rows(8, 4) * T, "T*rows(8, 4)", 96),
        (hit(8, 2), "hit(8, 2)", 8 * (1 - 0.75**12)),
    ],
)
def test_a_formula_reads_as_it_is_and_has_its_value(made: Formula, text: str, value: float) -> None:
    assert str(made) == text
    assert made.at(SIZES) == pytest.approx(value)


@pytest.mark.parametrize("most", [None, 8, 128, 512])
@pytest.mark.parametrize("ratio", [1, 4, 128])
@pytest.mark.parametrize(("tokens", "context"), [(1, 1), (1, 4096), (7, 7), (300, 300), (256, 5000), (512, 700)])
def test_the_rows_of_a_token_are_those_of_the_mean_token(
    most: int | None, ratio: int, tokens: int, context: int
) -> None:
    positions = range(context - tokens + 1, context + 1)
    exact = sum(min(p / ratio, most if most is not None else p) for p in positions) / tokens
    assert mean_rows(most, ratio, tokens, context) == pytest.approx(exact, rel=2e-3, abs=0.13 / ratio)


def test_a_rank_with_fewer_experts_than_choices_has_all_of_them_hit() -> None:
    assert [hit(3, 6).at({"T": tokens}) for tokens in (1, 2, 16)] == [3, 3, 3]
    assert hit(6, 6).at({"T": 1}) == 6
    assert hit(8, 2).at({"T": 1}) == 2
