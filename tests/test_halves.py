"""Which steps of a layout run in two micro-batches, and why."""

from __future__ import annotations

import pytest

from atomc.artifact.manifest import Serving
from atomc.compiler import Options, check_limits, serving_facts
from atomc.halves import Largest, overlapped
from atomc.models.source import open_model
from atomc.parallel.layout import parse_layout
from atomc.targets import get_target

SOURCE = open_model("deepseek-v4-flash", with_weights=False)


def serving(**limits: int) -> Serving:
    options = Options(with_weights=False, **limits)
    return serving_facts(SOURCE, check_limits(options, SOURCE.config))


LARGE = serving(max_batch_tokens=8192, max_requests=64)


def decided(layout: str, target: str = "mi355x", known: Serving = LARGE) -> tuple[dict[str, int], dict[str, str]]:
    least, why = overlapped(SOURCE.config, parse_layout(layout), get_target(target), known)
    return dict(least), dict(why)


def test_nothing_is_decided_where_nobody_asks() -> None:
    assert decided("dp=8,moe=tp") == ({}, {})


def test_what_is_asked_for_is_done_and_its_gain_said() -> None:
    least, why = decided("dp=8,moe=tp,tbo=prefill")
    assert least == {"prefill": 2}
    assert why["decode"] == "tbo=prefill leaves decode whole"
    assert "predicted at 8,192 rows" in why["prefill"]
    assert decided("dp=8,moe=tp,tbo=all")[0] == {"prefill": 2, "decode": 2}


def test_auto_takes_the_buckets_from_which_all_gain() -> None:
    least, why = decided("dp=8,moe=tp,tbo=auto")
    assert least == {"prefill": 1024}
    assert why["prefill"].startswith("+") and "less of exposed communication" in why["decode"]
    assert decided("dp=2,moe=tp,tbo=auto", "h100")[0] == {}


@pytest.mark.parametrize(
    ("layout", "found"), [("dp=8,moe=tp,tbo=auto", {}), ("dp=8,moe=tp,tbo=all", {"prefill": 2, "decode": 2})]
)
def test_nothing_is_predicted_for_a_target_without_links(layout: str, found: dict[str, int]) -> None:
    least, why = decided(layout, "cpu")
    assert least == found
    assert "nothing is predicted for cpu" in why["prefill"]


def test_a_row_has_no_halves() -> None:
    least, why = decided("dp=8,moe=tp,tbo=all", known=serving(max_batch_tokens=8192, max_requests=1))
    assert least == {"prefill": 2}
    assert "one row, which has no two halves" in why["decode"]


def test_the_largest_steps() -> None:
    assert Largest("prefill", LARGE).step().tokens == 8192
    assert (Largest("decode", LARGE).step().tokens, Largest("decode", LARGE).step().requests) == (64, 64)
