"""Sampling parameters: every illegal value is refused with its field and its legal range."""

from __future__ import annotations

from typing import Any

import pytest

from atomc.runtime.errors import RequestError
from atomc.runtime.request import SamplingParams


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("temperature", -0.1, "[0, 2]"),
        ("temperature", 2.5, "[0, 2]"),
        ("temperature", float("nan"), "number"),
        ("temperature", "hot", "number"),
        ("temperature", True, "number"),
        ("top_p", 0, "(0, 1]"),
        ("top_p", 1.01, "(0, 1]"),
        ("top_k", -2, "[-1"),
        ("top_k", 1.5, "integer"),
        ("seed", 2**63, "integer"),
        ("max_tokens", 0, "[1"),
        ("max_tokens", True, "integer"),
        ("logprobs", 21, "[0, 20]"),
        ("logprobs", -1, "[0, 20]"),
        ("ignore_eos", 1, "true or false"),
        ("stop", [""], "1 to 1024"),
        ("stop", ["a"] * 17, "at most 16"),
        ("stop", [3], "1 to 1024"),
        ("stop_token_ids", [-1], "integer"),
        ("stop_token_ids", ["a"], "integer"),
    ],
)
def test_illegal_values_are_refused(name: str, value: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in caught.value.message
    assert says in caught.value.message


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_parameters_are_values() -> None:
    assert SamplingParams(stop=["a"], seed=3) == SamplingParams(stop=("a",), seed=3)
    assert SamplingParams(temperature=0, top_k=-1).top_k == -1
