"""POST /v1/completions: a text or ids go on, for one or several prompts, n times each."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from atomc.runtime.frontend import Frontend, Stream
from atomc.runtime.intake import Prompt
from atomc.runtime.server.problems import ApiError
from atomc.runtime.server.schema import MAX_CHOICES, CompletionBody, refuse
from atomc.runtime.server.transport import (
    CompletionLogprobs,
    EventStream,
    Usage,
    answer_or_give_up,
    outputs_of,
)

_DEFAULT_MAX_TOKENS = 16


async def complete(engine: Frontend, body: CompletionBody, request: Request) -> Response:
    """Checks the body, submits every choice, and answers at once or as a stream of events."""
    prompts = _prompts(body.prompt)
    refuse("suffix", body.suffix)
    if body.best_of is not None and body.best_of != body.choices:
        refuse("best_of", body.best_of)
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo with logprobs is not supported.", param="echo", code="unsupported_parameter")
    if len(prompts) * body.choices > MAX_CHOICES:
        raise ApiError(
            400,
            f"{len(prompts)} prompts times n = {body.choices} are more than {MAX_CHOICES} choices.",
            param="n",
            code="invalid_value",
        )
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = [body.params(choice, max_tokens=max_tokens, logprobs=body.logprobs) for choice in range(body.choices)]
    stream = await engine.submit([(prompt, one) for prompt in prompts for one in params])
    answer = _Answer(engine, body, prompts, stream)
    if body.stream:
        return EventStream(answer.events(), stream)
    return await answer_or_give_up(request, stream, answer.whole())


def _prompts(prompt: Any) -> list[Prompt]:
    """The prompts of a request; a list of numbers is one prompt. Raises `ApiError`; ids are checked by the engine."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, int) for part in prompt):
            return [prompt]
        if all(isinstance(part, str) for part in prompt) or all(isinstance(part, list) for part in prompt):
            return prompt
    raise ApiError(
        400,
        "prompt must be a text, a list of texts, a list of token ids, or a list of lists of token ids, and not empty.",
        param="prompt",
        code="invalid_type",
    )


class _Answer:
    """One HTTP answer: the choices of a stream, whole or in chunks."""

    def __init__(self, engine: Frontend, body: CompletionBody, prompts: list[Prompt], stream: Stream) -> None:
        self.engine, self.body, self.stream = engine, body, stream
        vocabulary = engine.vocabulary
        self.usage = Usage(sum(r.prompt_tokens for r in stream.requests[:: body.choices]))
        self.echoes = [
            "" if not body.echo else prompt if isinstance(prompt, str) else vocabulary.decode(prompt)
            for prompt in prompts
            for _ in range(body.choices)
        ]
        self.logprobs = [CompletionLogprobs(vocabulary) for _ in stream.requests]
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Chunks, each with one choice; at the end the usage, if asked for."""
        usage: dict[str, Any] = {"usage": None} if self.body.include_usage else {}
        for index, echo in enumerate(self.echoes):
            if echo:
                yield self.head | {"choices": [self._choice(index, echo, None, None)]} | usage
        async for index, output in outputs_of(self.engine, self.stream):
            self.usage.count(index, output)
            logprobs = self.logprobs[index].payload(output.logprobs) if output.logprobs else None
            if output.text or output.finish_reason or logprobs:
                choice = self._choice(index, output.text, logprobs, output.finish_reason)
                yield self.head | {"choices": [choice]} | usage
        if self.body.include_usage:
            yield self.head | {"choices": [], "usage": self.usage.payload()}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        texts = list(self.echoes)
        logprobs: list[list[Any]] = [[] for _ in texts]
        reasons: list[str | None] = [None] * len(texts)
        async for index, output in outputs_of(self.engine, self.stream):
            self.usage.count(index, output)
            texts[index] += output.text
            logprobs[index] += output.logprobs
            reasons[index] = output.finish_reason
        choices = [
            self._choice(
                index,
                text,
                None if self.body.logprobs is None else self.logprobs[index].payload(tuple(logprobs[index])),
                reasons[index],
            )
            for index, text in enumerate(texts)
        ]
        return self.head | {"choices": choices, "usage": self.usage.payload()}

    @staticmethod
    def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
