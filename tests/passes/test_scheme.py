"""Schemes: found by name or file, checked whole, and refused with the rule and the text that is wrong."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from atomc.passes.scheme import DESCRIPTIONS, SCHEMES, Rule, Scheme, SchemeError, check_scheme, get_scheme


def test_every_scheme_is_described_and_legal() -> None:
    assert SCHEMES.keys() == DESCRIPTIONS.keys()
    for scheme in SCHEMES.values():
        check_scheme(scheme)


def test_the_first_rule_that_fits_decides() -> None:
    rules = (Rule("linear", r"attn\.wq_b", "stored"), Rule("linear", r"attn\..*", "bfloat16"))
    scheme = Scheme("mine", rules)
    assert scheme.rule("linear", ("attn.wq_b",)) == (1, rules[0])
    assert scheme.rule("linear", ("attn.wq_b", "attn.wkv")) == (2, rules[1])  # a merged product: one rule for all
    assert scheme.rule("experts", ("attn.wq_b",)) is None
    assert scheme.rule("linear", ("attn.wq_b.more",)) == (2, rules[1])
    assert scheme.rule("linear", ("ffn.w1",)) is None


def test_a_scheme_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(SCHEMES["fp8"]))
    assert get_scheme(str(path)) == SCHEMES["fp8"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a scheme"),
        ('{"name": "x", "rule": []}', "unknown field `rule`"),
        ('{"name": "x", "rows": "fp4"}', "Invalid enum value"),
        ('{"name": "x", "rules": [{"op": "linear", "path": "(", "weight": "stored"}]}', "rule 1"),
        ('{"name": "x", "rules": [{"op": "linear", "path": "a", "weight": "e4m3:12"}]}', "is no layout"),
        ('{"name": "x", "rules": [{"op": "linear", "path": "a", "weight": "stored", "activation": "e4m3:2x8:e8m0"}]}',
         "blocks of several tokens"),
        ('{"name": "x", "rules": [{"op": "linear", "path": "a", "weight": "bfloat16", "activation": "e4m3:1x8:e8m0"}]}',
         "a bfloat16 weight takes"),
    ],
)  # fmt: skip
def test_what_is_no_scheme_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(SchemeError, match=words):
        get_scheme(str(path))


def test_an_unknown_name_and_a_missing_file() -> None:
    with pytest.raises(SchemeError, match="choose one of native, w4a8"):
        get_scheme("int4")
    with pytest.raises(SchemeError, match="cannot be read"):
        get_scheme("nowhere.json")
