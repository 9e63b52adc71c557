"""`LLM`: the runtime as a Python object, for scripts and notebooks. The server has `AsyncEngine` instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from atomc.runtime.engine import Engine
from atomc.runtime.errors import EngineError, RequestError
from atomc.runtime.intake import Prompt
from atomc.runtime.protocols import Executor
from atomc.runtime.request import FinishReason, Output, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole answer to one prompt; `logprobs` is empty unless asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


class LLM:
    """Batched and streaming generation over one executor; use it from one thread at a time."""

    def __init__(self, executor: Executor) -> None:
        self.engine = Engine(executor)
        self._mail: dict[str, list[Output]] = {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answers to all prompts, in their order, computed together.

        A prompt is a text or a list of ids; one prompt alone also gives a list. One `params` serves all prompts, or
        there is one for each. Raises `RequestError` before anything runs when any request is wrong, `EngineError`
        when a step fails.
        """
        batch = _as_batch(prompts)
        each = [params or SamplingParams()] * len(batch) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(batch):
            raise RequestError(f"There are {len(batch)} prompts but {len(each)} sampling parameters.", param="params")
        requests = [self.engine.prepare(prompt, one) for prompt, one in zip(batch, each, strict=True)]
        for request in requests:
            self._mail[request.id] = []
            self.engine.submit(request)
        try:
            return [_join(list(self._outputs(request.id))) for request in requests]
        finally:
            for request in requests:
                self._forget(request.id)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Output]:
        """The outputs of one request as they come; closing the iterator early frees the request.

        Raises as `generate` does, at once for a wrong request.
        """
        request = self.engine.prepare(prompt, params)
        self._mail[request.id] = []
        self.engine.submit(request)
        return self._watch(request.id)

    def _watch(self, request_id: str) -> Iterator[Output]:
        try:
            yield from self._outputs(request_id)
        finally:
            self._forget(request_id)

    def _outputs(self, request_id: str) -> Iterator[Output]:
        """Steps the engine until this request has ended; what others get meanwhile waits in their mail."""
        while True:
            mail = self._mail[request_id]
            while mail:
                output = mail.pop(0)
                if output.finish_reason == "error":
                    raise EngineError(output.error or "The request ended in an error.") from self.engine.failure
                yield output
                if output.finish_reason is not None:
                    return
            for output in self.engine.step():
                if output.request_id in self._mail:
                    self._mail[output.request_id].append(output)

    def _forget(self, request_id: str) -> None:
        self.engine.abort(request_id)
        self._mail.pop(request_id, None)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]  # a text, or the ids of one prompt
    return list(prompts)  # type: ignore[arg-type]


def _join(outputs: list[Output]) -> Completion:
    reason = outputs[-1].finish_reason
    assert reason is not None
    return Completion(
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        finish_reason=reason,
        prompt_tokens=outputs[-1].prompt_tokens,
        logprobs=tuple(logprob for output in outputs for logprob in output.logprobs),
    )
