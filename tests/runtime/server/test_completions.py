"""/v1/completions with OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atomc.runtime.llm import LLM
from atomc.runtime.request import SamplingParams
from tests.support.fake_executor import FakeExecutor
from tests.support.serving import SERVING, Running, serving

MODEL = SERVING.model_name
FREE: dict[str, Any] = {"ignore_eos": True}


@pytest.fixture(scope="module")
def server(tokenizer_path: Path) -> Iterator[Running]:
    with serving(tokenizer_path) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_leaks(server: Running) -> Iterator[None]:
    yield
    server.wait_until_idle()


def expected(server: Running, prompt: str | list[int], **params: Any) -> str:
    """The answer of the same model without a server."""
    path = server.engine.engine.executor.tokenizer_path
    llm = LLM(FakeExecutor(SERVING, num_blocks=1000, tokenizer_path=path))
    return llm.generate(prompt, SamplingParams(ignore_eos=True, **params))[0].text


def test_an_answer(server: Running) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="hello", seed=5, max_tokens=12, extra_body=FREE)
    assert answer.object == "text_completion"
    assert answer.model == MODEL
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == expected(server, "hello", seed=5, max_tokens=12)
    assert answer.usage is not None
    prompt_tokens = len(server.engine.engine.vocabulary.encode("hello")) + 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, 12)


def test_a_stream_joins_to_the_answer(server: Running) -> None:
    stream = server.openai.completions.create(
        model=MODEL, prompt="hello", seed=5, max_tokens=30, stream=True, extra_body=FREE,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30
    assert all(chunk.usage is None for chunk in chunks[:-1])
    text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert text == expected(server, "hello", seed=5, max_tokens=30)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_sixteen_tokens_by_default(server: Running) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt="hello", extra_body=FREE)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("prompt", [["a", "bb"], [[5, 6], [7, 8, 9]]])
def test_several_prompts_n_times(server: Running, prompt: Any) -> None:
    answer = server.openai.completions.create(model=MODEL, prompt=prompt, n=3, seed=10, max_tokens=6, extra_body=FREE)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for choice in answer.choices:
        one = prompt[choice.index // 3]
        assert choice.text == expected(server, one, seed=10 + choice.index % 3, max_tokens=6)
    assert len({choice.text for choice in answer.choices}) > 3
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5 if prompt[0] != "a" else 2 + 3, 36)


def test_ids_and_echo(server: Running) -> None:
    ids = server.engine.engine.vocabulary.encode("hello")
    for stream in (False, True):
        made = server.openai.completions.create(
            model=MODEL, prompt=ids, echo=True, seed=1, max_tokens=4, stream=stream, extra_body=FREE
        )
        text = "".join(c.choices[0].text for c in made) if stream else made.choices[0].text  # type: ignore[union-attr]
        assert text == "hello" + expected(server, ids, seed=1, max_tokens=4)


def test_a_stop_string_is_not_in_the_answer(server: Running) -> None:
    whole = expected(server, "hello", seed=3, max_tokens=40)
    stop = whole[9:12]
    answer = server.openai.completions.create(
        model=MODEL, prompt="hello", seed=3, max_tokens=40, stop=[stop, "never there"], extra_body=FREE
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == whole[: whole.index(stop)]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server: Running, stream: bool) -> None:
    made = server.openai.completions.create(
        model=MODEL, prompt="hello", temperature=0, max_tokens=5, logprobs=2, stream=stream, extra_body=FREE
    )
    parts: list[Any] = list(made) if stream else [made]
    found = [part.choices[0].logprobs for part in parts if part.choices[0].logprobs]
    logprobs = [value for part in found for value in part.token_logprobs or []]
    tops = [top for part in found for top in part.top_logprobs or []]
    tokens = [token for part in found for token in part.tokens or []]
    offsets = [offset for part in found for offset in part.text_offset or []]
    assert len(logprobs) == len(tops) == len(tokens) == 5
    assert all(value == max(top.values()) <= 0 for value, top in zip(logprobs, tops, strict=True))
    assert offsets == [sum(map(len, tokens[:index])) for index in range(5)]


def test_many_clients_at_once(server: Running) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(seed: int) -> str:
        answer = server.openai.completions.create(
            model=MODEL, prompt=f"client {seed}", seed=seed, max_tokens=20, extra_body=FREE
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert answers == [expected(server, f"client {seed}", seed=seed, max_tokens=20) for seed in range(12)]
