"""Bits per byte: every token once, with as much before it as promised; the same sums however documents are batched."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atomc.ops.batch import Batch
from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.errors import EngineError, ServingError
from atomc.runtime.evaluate import Score, evaluate, windows
from tests.support.fake_executor import FakeExecutor, FakeServing, digest_of, logits_of

TEXTS = ["hello world, hello there", "the theory of the thing " * 12, "", "é", "def f(x): return x " * 3]
SERVING = FakeServing(max_logit_rows=16)


class AnyRow(FakeExecutor):
    """Gives logits of any token, not only of the last of each request."""

    def step(self, batch: Batch) -> torch.Tensor:
        assert len(batch.logit_rows) <= self.serving.max_logit_rows
        last = batch.query_start[1:] - 1
        super().step(batch._replace(logit_rows=last[: self.serving.max_logit_rows].contiguous()))
        rows = []
        for token in batch.logit_rows.tolist():
            history = self.histories[int(batch.slots[batch.requests[token]])]
            rows.append(logits_of(history.digests[int(batch.positions[token])], self.serving.vocab_size))
        return torch.from_numpy(np.stack(rows))


def nats(before: list[int], token: int, vocab: int) -> float:
    logits = logits_of(digest_of(before), vocab).astype(np.float64)
    return float(np.log(np.exp(logits).sum()) - logits[token])


@pytest.mark.parametrize("serving", [SERVING, SERVING.but(max_logit_rows=3), SERVING.but(max_requests=1)])
def test_the_sum_over_documents_is_the_models(tokenizer_path: Path, serving: FakeServing) -> None:
    executor = AnyRow(serving, tokenizer_path=tokenizer_path)
    score = evaluate(executor, TEXTS, eos=True)
    vocabulary = Vocabulary.from_file(tokenizer_path)
    documents = [[0, *vocabulary.encode(text), 1] for text in TEXTS]
    expected = sum(nats(ids[:i], ids[i], serving.vocab_size) for ids in documents for i in range(1, len(ids)))
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.tokens == sum(len(ids) - 1 for ids in documents)
    assert score.bytes == sum(len(text.encode()) for text in TEXTS)
    assert score.documents == len(TEXTS)
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / score.bytes, rel=1e-5)


def test_a_long_document_is_read_in_overlapping_windows(tokenizer_path: Path) -> None:
    executor = AnyRow(SERVING, tokenizer_path=tokenizer_path)
    score = evaluate(executor, [TEXTS[1]], context=20, overlap=5)
    ids = [0, *Vocabulary.from_file(tokenizer_path).encode(TEXTS[1])]
    assert len(ids) > 40
    expected, begin, done = 0.0, 0, 0
    while done < len(ids) - 1:
        end = min(begin + 20, len(ids) - 1)
        expected += sum(nats(ids[begin:i], ids[i], SERVING.vocab_size) for i in range(done + 1, end + 1))
        begin, done = end - 5, end
    assert score.nats == pytest.approx(expected, rel=1e-5)
    assert score.tokens == len(ids) - 1


def test_without_bos_the_first_token_costs_a_guess(tokenizer_path: Path) -> None:
    executor = AnyRow(SERVING, tokenizer_path=tokenizer_path)
    score = evaluate(executor, ["hello"], bos=False)
    ids = Vocabulary.from_file(tokenizer_path).encode("hello")
    rest = sum(nats(ids[:i], ids[i], SERVING.vocab_size) for i in range(1, len(ids)))
    assert score.nats == pytest.approx(math.log(SERVING.vocab_size) + rest, rel=1e-5)
    assert score.tokens == len(ids)


def test_progress_reaches_the_total(tokenizer_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    score = evaluate(AnyRow(SERVING, tokenizer_path=tokenizer_path), TEXTS, progress=lambda *at: seen.append(at))
    assert seen[-1] == (score.computed, score.computed)


@given(length=st.integers(2, 200), context=st.integers(1, 50), overlap=st.integers(0, 49))
def test_windows_score_each_token_once(length: int, context: int, overlap: int) -> None:
    overlap = min(overlap, context - 1)
    ids = list(range(length))
    scored: list[int] = []
    for number, window in enumerate(windows(ids, context, overlap)):
        assert 1 <= len(window.tokens) <= context
        assert window.targets == [token + 1 for token in window.tokens]
        assert window.first == (overlap if number else 0)
        scored += window.targets[window.first :]
    assert scored == ids[1:]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"context": 0}, "1 to"), ({"context": 300}, "1 to 256"), ({"context": 8, "overlap": 8}, "0 to 7")],
)
def test_impossible_windows_are_refused(tokenizer_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ServingError, match=said):
        evaluate(AnyRow(SERVING, tokenizer_path=tokenizer_path), ["hello"], **options)


def test_nothing_to_score_is_refused(tokenizer_path: Path) -> None:
    for texts in ([], [""]):
        with pytest.raises(ServingError, match="no text"):
            evaluate(AnyRow(SERVING, tokenizer_path=tokenizer_path), texts)


def test_logits_that_are_no_numbers_are_an_error(tokenizer_path: Path) -> None:
    class Broken(AnyRow):
        def step(self, batch: Batch) -> torch.Tensor:
            return super().step(batch) * torch.nan

    with pytest.raises(EngineError, match="not finite"):
        evaluate(Broken(SERVING, tokenizer_path=tokenizer_path), ["hello"])


def test_a_score_divides_by_bytes() -> None:
    score = Score(documents=1, bytes=8, tokens=4, nats=8 * math.log(2))
    assert score.bits_per_byte == 1
    assert score.bytes_per_token == 2
