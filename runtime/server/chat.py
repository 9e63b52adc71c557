"""POST /v1/chat/completions: messages in, a message out; content, reasoning_content and tool_calls."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from atomc.runtime.frontend import Frontend, Stream
from atomc.runtime.request import MAX_LOGPROBS
from atomc.runtime.server.problems import ApiError
from atomc.runtime.server.recipe import AnswerParser, Chat, ChatFormat
from atomc.runtime.server.schema import ChatBody
from atomc.runtime.server.transport import EventStream, Usage, answer_or_give_up, chat_logprobs, outputs_of


async def chat(engine: Frontend, form: ChatFormat, body: ChatBody, request: Request) -> Response:
    """Checks and encodes the conversation, submits every choice, and answers at once or as a stream of events."""
    logprobs = _logprobs(body)
    opened = form.open(body)
    context = min(engine.serving.max_context, engine.intake.token_capacity)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens is None:
        max_tokens = form.default_max_tokens(opened, context)
    params = [body.params(choice, max_tokens=max_tokens, logprobs=logprobs) for choice in range(body.choices)]
    stream = await engine.submit([(opened.prompt, one) for one in params])
    answer = _Answer(engine, form, body, opened, stream)
    if body.stream:
        return EventStream(answer.events(), stream)
    return await answer_or_give_up(request, stream, answer.whole())


def _logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs", code="invalid_value")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise ApiError(
            400,
            f"top_logprobs is {body.top_logprobs}; it must be in [0, {MAX_LOGPROBS}].",
            param="top_logprobs",
            code="invalid_value",
        )
    return (body.top_logprobs or 0) if body.logprobs else None


class _Answer:
    """One HTTP answer: the choices of a stream, whole or in chunks."""

    def __init__(self, engine: Frontend, form: ChatFormat, body: ChatBody, opened: Chat, stream: Stream) -> None:
        self.engine, self.body, self.stream = engine, body, stream
        self.vocabulary = engine.vocabulary
        self.usage = Usage(len(opened.prompt))
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.parsers = [form.parser(opened, self.id) for _ in stream.requests]
        # Text may be held back (a tag may follow), log-probabilities wait with it.
        self.logprobs: list[list[dict[str, Any]]] = [[] for _ in stream.requests]

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Chunks, each with one choice; at the end the usage, if asked for."""
        for index, parser in enumerate(self.parsers):
            for delta in parser.open():
                yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
        async for index, output in outputs_of(self.engine, self.stream):
            self.usage.count(index, output)
            parser = self.parsers[index]
            self.logprobs[index] += chat_logprobs(self.vocabulary, output.logprobs)
            deltas = parser.take(output)
            for number, delta in enumerate(deltas, start=1):
                last = number == len(deltas)
                yield self._chunk([self._delta(index, delta, parser.finish_reason if last else None)])
            if parser.finish_reason is not None:
                self.stream.cancel(index)
        if self.body.include_usage:
            yield self._chunk([]) | {"usage": self.usage.payload()}

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        for parser in self.parsers:
            parser.open()
        async for index, output in outputs_of(self.engine, self.stream):
            self.usage.count(index, output)
            self.logprobs[index] += chat_logprobs(self.vocabulary, output.logprobs)
            self.parsers[index].take(output)
            if self.parsers[index].finish_reason is not None:
                self.stream.cancel(index)
        choices = [self._choice(index, parser) for index, parser in enumerate(self.parsers)]
        return self._head("chat.completion") | {"choices": choices, "usage": self.usage.payload()}

    def _choice(self, index: int, parser: AnswerParser) -> dict[str, Any]:
        logprobs = {"content": self.logprobs[index]} if self.body.logprobs else None
        return {
            "index": index,
            "message": parser.message(),
            "logprobs": logprobs,
            "finish_reason": parser.finish_reason,
        }

    def _delta(self, index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        waiting, self.logprobs[index] = self.logprobs[index], []
        return {
            "index": index,
            "delta": delta,
            "logprobs": {"content": waiting} if waiting else None,
            "finish_reason": reason,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage: dict[str, Any] = {"usage": None} if self.body.include_usage else {}
        return self._head("chat.completion.chunk") | {"choices": choices} | usage

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}
