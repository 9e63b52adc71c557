"""What both endpoints send through: server-sent events, answers given up when the client leaves, log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.frontend import Frontend, Stream
from atomc.runtime.request import Output, TokenLogprob
from atomc.runtime.server.problems import ApiError

T = TypeVar("T")

# JSON has no -inf; OpenAI writes this.
_LOWEST = -9999.0
_CLIENT_GONE = 499


def json_response(payload: object) -> Response:
    """A 200 answer."""
    return Response(msgspec.json.encode(payload), media_type="application/json")


class EventStream(StreamingResponse):
    """Server-sent events over an engine's stream, which is cancelled when the response ends, however it ends."""

    def __init__(self, events: AsyncIterator[dict[str, Any]], stream: Stream) -> None:
        super().__init__(
            _encode(events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the generator: one that was never started runs no `finally`.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.cancel()


async def _encode(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield b"data: " + msgspec.json.encode(event) + b"\n\n"
    except ApiError as error:  # the status is long sent: the error is an event
        yield b"data: " + msgspec.json.encode(error.body) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def answer_or_give_up(request: Request, stream: Stream, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """The answer `work` makes of the stream; a client that leaves meanwhile frees the requests at once."""
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return json_response(answer.result()) if answer.done() else Response(status_code=_CLIENT_GONE)
    finally:
        stream.cancel()
        answer.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def outputs_of(engine: Frontend, stream: Stream) -> AsyncIterator[tuple[int, Output]]:
    """The stream's outputs; raises `ApiError` when one of its requests ends in an error."""
    async for index, output in stream:
        if output.finish_reason == "error":
            status, code = engine.problem
            raise ApiError(status, output.error or "The request ended in an error.", code=code)
        yield index, output


class Usage:
    """Token counts of one HTTP request: each prompt once, all answers."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._completion: dict[int, int] = {}

    def count(self, index: int, output: Output) -> None:
        self._completion[index] = output.completion_tokens

    def payload(self) -> dict[str, int]:
        completion = sum(self._completion.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }


def token_text(vocabulary: Vocabulary, token: int) -> str:
    """A token's text; half a character is spelled `bytes:\\xef`, as OpenAI does."""
    piece = vocabulary.spelling(token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def chat_logprobs(vocabulary: Vocabulary, logprobs: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
    """The entries of `logprobs.content` of a chat answer."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        piece = vocabulary.spelling(token)
        text = token_text(vocabulary, token)
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(piece)}

    return [
        entry(each.token, each.logprob) | {"top_logprobs": [entry(token, value) for token, value in each.top]}
        for each in logprobs
    ]


class CompletionLogprobs:
    """`logprobs` of /v1/completions: parallel lists; offsets count the characters of the tokens before."""

    def __init__(self, vocabulary: Vocabulary, offset: int = 0) -> None:
        self._vocabulary = vocabulary
        self._offset = offset

    def payload(self, logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
        """The lists for these tokens; a stream has one such object for each of its chunks."""
        texts = [token_text(self._vocabulary, each.token) for each in logprobs]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(each.logprob, _LOWEST) for each in logprobs],
            "top_logprobs": [
                {token_text(self._vocabulary, token): max(value, _LOWEST) for token, value in each.top}
                for each in logprobs
            ],
            "text_offset": offsets,
        }
