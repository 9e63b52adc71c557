"""Whatever arrives, in whatever order, over whatever pools: answers as if alone, nothing leaks, nothing hangs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.engine import Engine
from atomc.runtime.errors import RequestError
from atomc.runtime.request import Output, Request, SamplingParams
from atomc.runtime.sampler import sample
from tests.support.fake_executor import FakeExecutor, FakeServing, digest_of, logits_of

VOCAB = 40


@dataclass(frozen=True)
class Case:
    """One request of a scenario; it arrives before `step` and is aborted before step `abort`, if any."""

    prompt: tuple[int, ...]
    params: SamplingParams
    step: int
    abort: int | None


@dataclass(frozen=True)
class Scenario:
    serving: FakeServing
    num_blocks: int
    num_window_pages: int
    num_slots: int
    cases: tuple[Case, ...]

    @property
    def capacity(self) -> int:
        return min(self.serving.max_context, (self.num_blocks - 1) * self.serving.block_tokens)


@st.composite
def servings(draw: st.DrawFn) -> FakeServing:
    csa, hca = draw(st.sampled_from([(2, 4), (4, 8), (2, 0), (0, 4), (0, 0)]))
    return FakeServing(
        vocab_size=VOCAB,
        window=draw(st.integers(1, 12)),
        window_page=draw(st.integers(1, 5)),
        block_tokens=8,
        csa_ratio=csa,
        hca_ratio=hca,
        max_context=draw(st.integers(20, 60)),
        max_batch_tokens=draw(st.integers(1, 20)),
        max_requests=draw(st.integers(1, 5)),
        max_logit_rows=draw(st.integers(1, 5)),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1.0])),
        top_k=draw(st.sampled_from([0, 3])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        seed=draw(st.integers(0, 2**63 - 1)),
        max_tokens=draw(st.integers(1, 24)),
        ignore_eos=draw(st.booleans()),
    )
    return Case(
        prompt=tuple(draw(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=30))),
        params=params,
        step=draw(st.integers(0, 12)),
        abort=draw(st.none() | st.integers(0, 30)),
    )


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    serving = draw(servings())
    bound = -(-(serving.window - 1) // serving.window_page) + 1
    return Scenario(
        serving=serving,
        num_blocks=1 + draw(st.integers(1, 12)),
        num_window_pages=1 + bound + draw(st.integers(0, 12)),
        num_slots=draw(st.integers(1, 6)),
        cases=tuple(draw(st.lists(cases(), min_size=1, max_size=7))),
    )


def alone(case: Case, serving: FakeServing) -> tuple[list[int], str]:
    """The answer by definition: logits of the whole history, one token at a time, no engine."""
    request = Request("alone", list(case.prompt), len(case.prompt), case.params, 0, frozenset(), 0.0)
    while True:
        logits = torch.from_numpy(logits_of(digest_of(request.tokens), serving.vocab_size))
        request.tokens.append(sample(logits[None], [request])[0].token)
        answer = request.tokens[request.prompt_tokens :]
        if answer[-1] in serving.eos_ids and not case.params.ignore_eos:
            return answer, "stop"
        if len(answer) == case.params.max_tokens:
            return answer, "length"


def play(scenario: Scenario, engine: Engine) -> dict[int, list[Output]]:
    """Runs a scenario to its end; outputs by case, none for the refused ones."""
    outputs: dict[int, list[Output]] = {}
    ids: dict[str, int] = {}
    last = max(max(case.step, case.abort or 0) for case in scenario.cases)
    work = sum(len(case.prompt) + (case.params.max_tokens or 0) for case in scenario.cases)
    for step in range(last + 1 + work * (len(scenario.cases) + 1)):
        for index, case in enumerate(scenario.cases):
            if case.step == step:
                with contextlib.suppress(RequestError):
                    ids[engine.add_request(case.prompt, case.params, request_id=f"case-{index}")] = index
                    outputs[index] = []
            if case.abort == step and index in outputs:
                engine.abort(f"case-{index}")
        for output in engine.step():
            outputs[ids[output.request_id]].append(output)
        if step > last and not engine.has_work:
            return outputs
    raise AssertionError("the engine hangs")


@settings(max_examples=300)
@given(scenario=scenarios())
def test_answers_are_those_of_each_request_alone(scenario: Scenario, vocabulary: Vocabulary) -> None:
    serving = scenario.serving
    executor = FakeExecutor(
        serving,
        num_blocks=scenario.num_blocks,
        num_window_pages=scenario.num_window_pages,
        num_slots=scenario.num_slots,
    )
    engine = Engine(executor, vocabulary=vocabulary)
    outputs = play(scenario, engine)
    assert engine.failure is None, engine.failure
    engine.caches.check_idle()
    for index, case in enumerate(scenario.cases):
        fits = len(case.prompt) + (case.params.max_tokens or 0) <= scenario.capacity
        assert (index in outputs) == fits
        if fits:
            check(case, outputs[index], *alone(case, serving))


def check(case: Case, outputs: Sequence[Output], tokens: list[int], reason: str) -> None:
    got = [token for output in outputs for token in output.token_ids]
    assert [output.completion_tokens for output in outputs] == list(range(1, len(outputs) + 1))
    ended = bool(outputs) and outputs[-1].finish_reason is not None
    if ended:
        assert (got, outputs[-1].finish_reason) == (tokens, reason)
    else:
        assert case.abort is not None, "a request without an end that nobody aborted"
        assert got == tokens[: len(got)]
    assert all(output.finish_reason is None for output in outputs[:-1])


@pytest.mark.parametrize("num_blocks", [5, 6, 9])
def test_preemption_happens_and_changes_nothing(vocabulary: Vocabulary, num_blocks: int) -> None:
    serving = FakeServing(vocab_size=VOCAB, max_requests=4, max_batch_tokens=12, max_context=64)
    params = [SamplingParams(seed=seed, max_tokens=20, ignore_eos=True) for seed in range(4)]
    made = [Case(tuple(range(2, 9 + seed)), params[seed], 0, None) for seed in range(4)]
    scenario = Scenario(serving, num_blocks, 40, 4, tuple(made))
    engine = Engine(FakeExecutor(serving, num_blocks=num_blocks, num_window_pages=40), vocabulary=vocabulary)
    outputs = play(scenario, engine)
    assert engine.scheduler.preemptions > 0
    for index, case in enumerate(made):
        check(case, outputs[index], *alone(case, serving))


def test_a_machine_that_mixes_up_pages_is_caught(vocabulary: Vocabulary) -> None:
    """The fake is strict: a scheduler that frees a page too early does not get away with it."""
    serving = FakeServing(vocab_size=VOCAB, window=8, window_page=2, max_requests=2)
    engine = Engine(FakeExecutor(serving, num_window_pages=12), vocabulary=vocabulary)
    engine.caches.window = 4  # a too small window: pages are given back while they can still be seen
    engine.add_request([5] * 12, SamplingParams(max_tokens=8, ignore_eos=True, seed=1))
    while engine.has_work:
        engine.step()
    assert "window page" in str(engine.failure)
