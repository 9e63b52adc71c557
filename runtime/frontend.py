"""`Frontend`: what the server talks to, whatever computes the answers behind it; `Stream`: the answers on their way.

Contract:
    Every request that `submit` took gets a last output, whatever happens: answer, failure, shutdown. Outputs may come
    from any thread; they reach the streams in their event loops.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Literal

from atomc.runtime.detokenize import Vocabulary
from atomc.runtime.errors import UnavailableError
from atomc.runtime.intake import Intake, Prompt
from atomc.runtime.metrics import Metrics
from atomc.runtime.protocols import Serving
from atomc.runtime.request import Output, Request, SamplingParams

Status = Literal["ready", "stopping", "failed"]

# Encoding a longer text in the event loop would hold up every stream.
_LONG_TEXT = 4096
_DRAIN_POLL_SECONDS = 0.02


class Stream:
    """Iterates over (index of the request, output) of requests submitted together, until all have ended."""

    def __init__(self, requests: Sequence[Request], cancel: Callable[[str], None]) -> None:
        self.requests = tuple(requests)
        self.loop = asyncio.get_running_loop()
        self._cancel = cancel
        self._open = {request.id: index for index, request in enumerate(requests)}
        self._outputs: asyncio.Queue[Output] = asyncio.Queue()

    def put(self, output: Output) -> None:
        """Called in the stream's event loop."""
        self._outputs.put_nowait(output)

    def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        while self._open:
            output = await self._outputs.get()
            index = self._open.get(output.request_id)
            if index is None:  # it was cancelled after this output was on its way
                continue
            if output.finish_reason is not None:
                del self._open[output.request_id]
            return index, output
        raise StopAsyncIteration

    def cancel(self, index: int | None = None) -> None:
        """Frees one request, or all, unless their last output was read; may be called any number of times."""
        for request in self.requests if index is None else (self.requests[index],):
            if self._open.pop(request.id, None) is not None:
                self._cancel(request.id)


class Frontend(ABC):
    """`max_live` bounds the requests waiting or running: beyond it clients are refused."""

    # The status and code of an answer that a failure has ended.
    failed_as: tuple[int, str] = (500, "engine_error")

    def __init__(self, intake: Intake, metrics: Metrics, tokenizer_path: Path, max_live: int) -> None:
        self.intake, self.metrics, self.tokenizer_path = intake, metrics, tokenizer_path
        self.max_live = max_live
        self._streams: dict[str, Stream] = {}
        # Makes "still accepting?" and "sent on" one act, so that nothing can be added behind a stop.
        self._gate = threading.Lock()
        self._stopping = False

    @property
    def serving(self) -> Serving:
        return self.intake.serving

    @property
    def vocabulary(self) -> Vocabulary:
        return self.intake.vocabulary

    @property
    @abstractmethod
    def failure(self) -> Exception | None:
        """Why nothing is computed any more; None while all is well."""

    @abstractmethod
    def _add(self, requests: Sequence[Request]) -> None:
        """Sends requests that were let in to where they run. Called with the gate held."""

    @abstractmethod
    def _abort(self, request_id: str) -> None:
        """Frees a request whose client has left."""

    @abstractmethod
    async def _stop(self, message: str) -> None:
        """Ends all requests with this error, and what computes them; returns when that is done."""

    @property
    def status(self) -> Status:
        if self.failure is not None:
            return "failed"
        return "stopping" if self._stopping else "ready"

    @property
    def problem(self) -> tuple[int, str]:
        """The status and code of an answer that ends in an error now."""
        if self.failure is not None:
            return self.failed_as
        return (503, "unavailable") if self._stopping else (500, "engine_error")

    @property
    def active(self) -> int:
        """Requests that have not got their last output."""
        return len(self._streams)

    async def submit(self, jobs: Sequence[tuple[Prompt, SamplingParams]]) -> Stream:
        """Takes several requests in, or none. Raises `RequestError` (the client's fault) or `UnavailableError`."""
        if any(isinstance(prompt, str) and len(prompt) > _LONG_TEXT for prompt, _ in jobs):
            requests = await asyncio.to_thread(self._prepare, jobs)
        else:
            requests = self._prepare(jobs)
        stream = Stream(requests, self._abort)
        with self._gate:
            self._refuse_if_unavailable(len(requests))
            for request in requests:
                self._streams[request.id] = stream
            self._add(requests)
        return stream

    async def shutdown(self, drain_seconds: float = 0.0, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuses new requests, lets running ones end for up to `drain_seconds` or until `hurry()`, fails the rest.

        Returns when nothing computes any more. May be called again.
        """
        with self._gate:
            self._stopping = True
        deadline = time.monotonic() + drain_seconds
        while self._streams and time.monotonic() < deadline and not hurry():
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        await self._stop("The server is shutting down.")

    def _prepare(self, jobs: Sequence[tuple[Prompt, SamplingParams]]) -> list[Request]:
        return [self.intake.prepare(prompt, params) for prompt, params in jobs]

    def _refuse_if_unavailable(self, count: int) -> None:
        if self.failure is not None:
            raise UnavailableError(f"The engine has failed and must be restarted: {self.failure}")
        if self._stopping:
            raise UnavailableError("The server is shutting down.")
        if len(self._streams) + count > self.max_live:
            raise UnavailableError(f"The queue is full: {len(self._streams)} requests are waiting or running.")

    def _refuse(self, requests: Sequence[Request], message: str) -> None:
        self._deliver([Output(r.id, "", (), (), r.prompt_tokens, 0, "error", message) for r in requests])

    def _deliver(self, outputs: Sequence[Output]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Output]]] = {}
        for output in outputs:
            ended = output.finish_reason is not None
            stream = self._streams.pop(output.request_id, None) if ended else self._streams.get(output.request_id)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream, output))
        for loop, pairs in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
                loop.call_soon_threadsafe(_put_all, pairs)


def _put_all(pairs: list[tuple[Stream, Output]]) -> None:
    for stream, output in pairs:
        stream.put(output)
