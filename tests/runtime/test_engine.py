"""The engine: ends of answers, refusals, aborts, failures, metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from atomc.ops.batch import Batch
from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.engine import Engine
from atomc.runtime.errors import RequestError, UnavailableError
from atomc.runtime.request import Output, SamplingParams
from tests.support.fake_executor import FakeExecutor, FakeServing

GREEDY = SamplingParams(temperature=0, max_tokens=20)


def scripted(vocabulary: Vocabulary, answer: str | list[int], **changes: Any) -> Engine:
    """An engine whose model answers every prompt of 4 tokens with these tokens, then with EOS."""
    ids = vocabulary.encode(answer) if isinstance(answer, str) else answer
    line = dict(enumerate(ids))
    executor = FakeExecutor(FakeServing(**changes), script=lambda tokens: line.get(len(tokens) - 4, 1))
    return Engine(executor, vocabulary=vocabulary)


def answer_of(engine: Engine, params: SamplingParams) -> list[Output]:
    engine.add_request([5, 6, 7, 8], params)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert engine.failure is None, engine.failure
    engine.caches.check_idle()
    return outputs


def text_of(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def test_eos_ends_an_answer_without_text(vocabulary: Vocabulary) -> None:
    outputs = answer_of(scripted(vocabulary, "hello"), GREEDY)
    assert text_of(outputs) == "hello"
    assert outputs[-1].finish_reason == "stop"
    assert outputs[-1].token_ids == (1,)
    assert outputs[-1].completion_tokens == len(outputs)
    assert outputs[-1].prompt_tokens == 4


def test_eos_can_be_ignored(vocabulary: Vocabulary) -> None:
    outputs = answer_of(scripted(vocabulary, "hello"), SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    assert (outputs[-1].finish_reason, len(outputs)) == ("length", 9)
    assert text_of(outputs) == "hello"


def test_a_stop_token_ends_an_answer(vocabulary: Vocabulary) -> None:
    stop = vocabulary.encode("w")[0]
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[stop], ignore_eos=True)
    outputs = answer_of(scripted(vocabulary, [*vocabulary.encode("ab"), stop, 50]), params)
    assert (text_of(outputs), outputs[-1].finish_reason) == ("ab", "stop")


def test_a_stop_string_ends_an_answer_before_it(vocabulary: Vocabulary) -> None:
    ids = [vocabulary.encode(c)[0] for c in "one STOP two"]
    outputs = answer_of(scripted(vocabulary, ids), SamplingParams(temperature=0, max_tokens=20, stop=["STOP"]))
    assert (text_of(outputs), outputs[-1].finish_reason) == ("one ", "stop")
    assert len(outputs) == len("one STOP")


def test_max_tokens_ends_an_answer_with_what_was_held_back(vocabulary: Vocabulary) -> None:
    ids = [vocabulary.encode(c)[0] for c in "one STOP two"]
    outputs = answer_of(scripted(vocabulary, ids), SamplingParams(temperature=0, max_tokens=6, stop=["STOP"]))
    assert (text_of(outputs), outputs[-1].finish_reason) == ("one ST", "length")


def test_without_max_tokens_the_context_is_the_limit(vocabulary: Vocabulary) -> None:
    engine = scripted(vocabulary, [50] * 100, max_context=30)
    outputs = answer_of(engine, SamplingParams(temperature=0))
    assert (outputs[-1].finish_reason, len(outputs)) == ("length", 26)


def test_a_text_prompt_begins_with_bos_once(vocabulary: Vocabulary) -> None:
    engine = scripted(vocabulary, "x")
    assert engine.prepare("hello").tokens == [0, *vocabulary.encode("hello")]
    assert engine.prepare("<｜begin▁of▁sentence｜>hello").tokens == [0, *vocabulary.encode("hello")]
    assert engine.prepare("").tokens == [0]
    assert engine.prepare([5, 6]).tokens == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "code", "says"),
    [
        ([], None, "prompt", "invalid_value", "empty"),
        ([5, 320], None, "prompt", "invalid_value", "320"),
        ([5, -1], None, "prompt", "invalid_value", "-1"),
        ([5, True], None, "prompt", "invalid_value", "True"),
        ([5, 1.0], None, "prompt", "invalid_value", "1.0"),
        ([5] * 256, None, "prompt", "context_length_exceeded", "256 tokens"),
        ([5] * 200, 57, "max_tokens", "context_length_exceeded", "257"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(
    vocabulary: Vocabulary, prompt: Any, max_tokens: int | None, param: str, code: str, says: str
) -> None:
    engine = scripted(vocabulary, "x")
    with pytest.raises(RequestError) as caught:
        engine.add_request(prompt, SamplingParams(max_tokens=max_tokens))
    assert (caught.value.param, caught.value.code) == (param, code)
    assert says in caught.value.message
    assert not engine.has_work


def test_a_request_larger_than_the_caches_is_refused_not_left_hanging(vocabulary: Vocabulary) -> None:
    engine = Engine(FakeExecutor(FakeServing(), num_blocks=1 + 3), vocabulary=vocabulary)
    with pytest.raises(RequestError, match="cache memory holds 24 tokens"):
        engine.add_request([5] * 20, SamplingParams(max_tokens=5))
    engine.add_request([5] * 20, SamplingParams(max_tokens=4, ignore_eos=True))
    outputs = [output for _ in range(20) for output in engine.step()]
    assert outputs[-1].finish_reason == "length"


def test_an_id_can_be_used_once_at_a_time(vocabulary: Vocabulary) -> None:
    engine = scripted(vocabulary, "x")
    engine.add_request([5], request_id="a")
    with pytest.raises(RequestError, match="already running"):
        engine.add_request([5], request_id="a")
    assert engine.abort("a")
    assert not engine.abort("a")
    engine.add_request([5], request_id="a")


def test_an_abort_frees_everything_at_once(vocabulary: Vocabulary) -> None:
    engine = scripted(vocabulary, "a long answer that is not finished")
    ids = [engine.add_request([5, 6, 7, 8], GREEDY) for _ in range(6)]
    engine.step()
    assert engine.caches.slots.used == 4
    for request_id in ids:
        assert engine.abort(request_id)
    assert not engine.has_work
    engine.caches.check_idle()
    assert engine.step() == []


def test_a_failing_executor_ends_every_request_with_an_error(vocabulary: Vocabulary) -> None:
    def explode(step: int) -> None:
        if step == 3:
            raise RuntimeError("the device is gone")

    engine = Engine(FakeExecutor(FakeServing(), before_step=explode), vocabulary=vocabulary)
    params = SamplingParams(ignore_eos=True, max_tokens=20)
    ids = {engine.add_request([5, 6], params) for _ in range(6)}
    engine.step()
    engine.step()
    outputs = engine.step()
    assert {output.request_id for output in outputs} == ids
    assert {output.finish_reason for output in outputs} == {"error"}
    assert all("the device is gone" in (output.error or "") for output in outputs)
    assert isinstance(engine.failure and engine.failure.__cause__, RuntimeError)
    assert not engine.has_work
    with pytest.raises(UnavailableError, match="the device is gone"):
        engine.add_request([5])


def test_logits_of_a_wrong_shape_are_a_failure(vocabulary: Vocabulary) -> None:
    executor = FakeExecutor(FakeServing())
    executor.step = lambda batch: torch.zeros(len(batch.logit_rows), 7)  # type: ignore[method-assign]
    engine = Engine(executor, vocabulary=vocabulary)
    engine.add_request([5])
    assert "[1, 7]" in (engine.step()[0].error or "")


def test_logits_that_are_not_finite_end_their_own_request_only(vocabulary: Vocabulary) -> None:
    class Poisoned(FakeExecutor):
        def step(self, batch: Batch) -> torch.Tensor:
            logits = super().step(batch)
            for row, token in enumerate(batch.logit_rows.tolist()):
                if int(batch.ids[token]) == 9:
                    logits[row, 3] = torch.nan
            return logits

    executor = Poisoned(FakeServing(), script=lambda tokens: 50)
    engine = Engine(executor, vocabulary=vocabulary)
    bad = engine.add_request([5, 9], SamplingParams(max_tokens=3))
    good = engine.add_request([5, 8], SamplingParams(max_tokens=3))
    outputs = [output for _ in range(5) for output in engine.step()]
    ends = {output.request_id: output for output in outputs if output.finish_reason}
    assert ends[bad].finish_reason == "error"
    assert "position 1 are not finite" in (ends[bad].error or "")
    assert (ends[good].finish_reason, ends[good].completion_tokens) == ("length", 3)
    assert engine.failure is None


def test_metrics_count_what_happened(vocabulary: Vocabulary) -> None:
    engine = scripted(vocabulary, "hello")
    for _ in range(3):
        engine.add_request([5, 6, 7, 8], GREEDY)
    aborted = engine.add_request([5, 6, 7, 8], GREEDY)
    engine.step()
    text = engine.metrics.render().decode()
    assert "atomc_requests_running 4.0" in text
    assert 'atomc_pool_used{pool="slot"} 4.0' in text
    engine.abort(aborted)
    while engine.has_work:
        engine.step()
    value = engine.metrics.registry.get_sample_value
    assert value("atomc_requests_total", {"reason": "stop"}) == 3
    assert value("atomc_requests_total", {"reason": "abort"}) == 1
    assert value("atomc_prompt_tokens_total") == 16
    answer = len(vocabulary.encode("hello")) + 1
    assert value("atomc_generated_tokens_total") == 3 * answer + 1
    assert value("atomc_time_to_first_token_seconds_count") == 4
    assert value("atomc_inter_token_seconds_count") == 3 * (answer - 1)
    assert value("atomc_requests_running") == value("atomc_pool_used", {"pool": "block"}) == 0
