"""`LLM`: answers in the order of the prompts, streams that can be left, errors that are raised."""

from __future__ import annotations

from pathlib import Path

import pytest

from atomc.runtime.errors import EngineError, RequestError
from atomc.runtime.llm import LLM
from atomc.runtime.request import SamplingParams
from tests.support.fake_executor import FakeExecutor, FakeServing


@pytest.fixture
def llm(tokenizer_path: Path) -> LLM:
    return LLM(FakeExecutor(FakeServing(), tokenizer_path=tokenizer_path))


def params(seed: int, max_tokens: int = 8) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens, ignore_eos=True)


def test_many_prompts_are_answered_as_if_alone(llm: LLM) -> None:
    prompts = [f"prompt number {number}" * (number + 1) for number in range(6)]
    together = llm.generate(prompts, [params(seed) for seed in range(6)])
    alone = [llm.generate(prompt, params(seed))[0] for seed, prompt in enumerate(prompts)]
    assert together == alone
    assert [answer.finish_reason for answer in together] == ["length"] * 6
    assert llm.generate([]) == []


def test_one_prompt_may_be_ids(llm: LLM) -> None:
    assert llm.generate([5, 6, 7], params(1)) == llm.generate([[5, 6, 7]], [params(1)])


def test_a_stream_is_the_answer_in_pieces(llm: LLM) -> None:
    outputs = list(llm.stream("hello", params(3)))
    whole = llm.generate("hello", params(3))[0]
    assert "".join(output.text for output in outputs) == whole.text
    assert tuple(token for output in outputs for token in output.token_ids) == whole.token_ids
    assert len(outputs) == 8


def test_streams_can_interleave_and_be_left(llm: LLM) -> None:
    first, second = llm.stream("one", params(1, 20)), llm.stream("two", params(2, 20))
    pairs = [(next(first), next(second)) for _ in range(3)]
    assert pairs[2][0].completion_tokens == pairs[2][1].completion_tokens == 3
    first.close()  # type: ignore[attr-defined]
    assert len(list(second)) == 17
    assert not llm.engine.has_work
    llm.engine.caches.check_idle()


def test_a_wrong_request_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match="256"):
        llm.generate([[5], [5] * 256])
    with pytest.raises(RequestError, match="2 prompts but 1"):
        llm.generate(["a", "b"], [params(1)])
    with pytest.raises(RequestError):
        llm.stream([])
    assert not llm.engine.has_work


def test_a_failing_executor_is_raised(tokenizer_path: Path) -> None:
    def explode(step: int) -> None:
        raise RuntimeError("no memory")

    llm = LLM(FakeExecutor(FakeServing(), tokenizer_path=tokenizer_path, before_step=explode))
    with pytest.raises(EngineError, match="no memory"):
        llm.generate(["a", "b"])
